"""The shipped training script: a small GPT under torchrun, on any number of nodes. It needs torch, nothing else."""
