"""What is where, and who may touch it: the sidecar, and the client that engines reach it by."""
