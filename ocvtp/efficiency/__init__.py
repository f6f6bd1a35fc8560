"""What pruning saves: counted in closed form (`flops`) and measured (`latency`)."""
