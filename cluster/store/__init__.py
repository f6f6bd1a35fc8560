"""Published results: leases, workspaces, publication and what is left of attempts."""
