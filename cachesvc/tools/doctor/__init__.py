"""`kvist cache doctor`: checks of the host, of its disk and of a running kvistd."""
