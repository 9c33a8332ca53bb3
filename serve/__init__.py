"""A model on a server: page, API, one queue under both, and export. Works on sampling; knows nothing of training and scores."""
