"""Subcommands that evaluate, and that read what was evaluated."""
