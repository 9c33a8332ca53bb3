"""From a checkpoint and captions to images. Knows nothing of training and of scores."""
