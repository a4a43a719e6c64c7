"""An engine on a device: what it finds, how it computes there, and how much memory it takes."""
