"""The only package of ocvtp that imports lmms-eval: our model for it, its tasks on local data, and one quiet call."""
