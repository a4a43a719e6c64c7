"""The worker's half: what runs in an engine's process and reads, loads and stores blocks."""
