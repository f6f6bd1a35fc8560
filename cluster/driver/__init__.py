"""Policy: what is run, where it is tried again, what people see of it."""
