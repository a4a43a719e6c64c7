"""What the boards are made of: the grammar, and a file for each board."""
