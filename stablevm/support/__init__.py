"""Helpers for all other packages: errors, files, options, random numbers, precision, processes."""
