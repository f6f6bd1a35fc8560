"""The side of a worker: one attempt from its claim to its publication."""
