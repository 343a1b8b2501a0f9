"""What went wrong on this node, and why: history, diagnosis and the report of a failure."""
