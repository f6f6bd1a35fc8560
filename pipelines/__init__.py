"""One thin script a stage of the experiment: read params.yaml, plan tasks, run them on a cluster, write outputs."""

FIRST_PARTY = ("ocvtp",)
"""Packages beside this one whose source counts in the keys of tasks (`cluster.fingerprint`)."""
