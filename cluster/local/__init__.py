"""Processes of this machine as an executor."""
