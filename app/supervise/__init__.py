"""One node's way through a job: the launcher while it runs."""
