"""Statistics of features: each metric in a file."""
