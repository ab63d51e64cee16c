"""Metrics of image features, one file for each."""
