"""Which block goes first: eviction policies, what they learn from, and the guard over them."""
