"""Evaluating images: sets of images, networks that extract features, and the commands."""
