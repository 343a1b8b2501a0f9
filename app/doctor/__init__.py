"""Is this cluster fit to train? Facts in, findings out; nothing here imports torch except the all-reduce itself."""
