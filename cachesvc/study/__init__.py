"""What another size or policy would hit: traces, replay, and the live what-if curve."""
