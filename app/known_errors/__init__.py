"""Known errors of multi-node training, as data: what a text means and what fixes it."""
