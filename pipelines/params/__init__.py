"""params.yaml: what is legal in it, and what it means."""
