"""What is where, and who may touch it: the sidecar, and the client through which engines reach it."""
