"""`kvist bench`: measure a server over HTTP, or the engine in this process."""
