"""Doubles and scaffolding for tests: clocks, disks, models, servers."""
