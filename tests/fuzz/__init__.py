"""Fuzzing: inputs that nobody sends on purpose, for all that reads bytes of others."""
