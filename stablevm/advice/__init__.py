"""Measurements on a user's data that recommend options of training."""
