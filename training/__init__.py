"""The training loops and what they need: run directories, progress, the averaged generator."""
