"""What doctor collects on a node: live facts of the machine, of its container engine, and of the path to a peer."""
