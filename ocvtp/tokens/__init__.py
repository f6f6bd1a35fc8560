"""Vision tokens on disk: extracted once a VLM, read by every training of a pruner."""
