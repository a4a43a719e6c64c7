"""The flash tier's life: its I/O threads, its wear, its failures, its return after a restart."""
