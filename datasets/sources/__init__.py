"""One data set a file: where its images are, and how its original download becomes our common layout."""
