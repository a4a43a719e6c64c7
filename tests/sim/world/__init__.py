"""A simulated world for one real store: one seed, one history, to the last byte."""
