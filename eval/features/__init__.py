"""Feature networks, the images that they read, statistics of features, and cached reference statistics."""
