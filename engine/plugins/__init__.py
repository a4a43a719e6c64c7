"""Kvist under other engines: one folder, one engine."""
