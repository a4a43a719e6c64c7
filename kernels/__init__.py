"""The arithmetic: one file, one operation, each with its meaning, its bound and a torch reference."""
