"""The consumer: an inference engine that takes its prefixes from the cache."""
