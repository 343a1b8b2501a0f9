"""`make demo`: two nodes of a cluster on one machine."""
