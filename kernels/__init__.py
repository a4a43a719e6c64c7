"""The arithmetic: one file, one operation, each with its bound and a torch reference."""
