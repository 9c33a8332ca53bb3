"""What every room may use: settings, losses, checkpoints, devices, images, randomness. Imports no other room."""
