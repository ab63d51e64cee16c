"""Preparing data for training from folders of images: convert, encode, pack, verify."""
