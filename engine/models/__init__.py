"""Model families: one file, one family."""
