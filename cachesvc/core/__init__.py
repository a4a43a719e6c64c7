"""The store: one object on one loop, of parts that each do one thing."""
