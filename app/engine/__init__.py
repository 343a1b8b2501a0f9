"""torchrun as a child of the launcher, and what runs inside its processes."""
