"""Figures, plotted with matplotlib, and sheets of images."""
