"""Monitor: what the blocks of a model see, over a training run."""
