"""One thin script a stage of the experiment: read params.yaml, plan tasks, run them on a cluster, write outputs."""
