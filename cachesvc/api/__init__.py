"""How calls come in: gRPC for everybody, packets for the workers of the node."""
