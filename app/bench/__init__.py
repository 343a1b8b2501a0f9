"""What the network of the job gives: collectives and pairs of nodes, measured under torchrun."""
