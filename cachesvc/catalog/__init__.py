"""The catalog: which block is where, shared with workers, and what only the sidecar knows."""
