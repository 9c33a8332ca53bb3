"""Classifiers and segmenters that read drawn birds, and the images that they read."""
