"""A Ray cluster as an executor, and its profiles."""
