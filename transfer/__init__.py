"""How bytes move between two memories: one file, one transport."""
