"""Prepared data sets: their contents, how they are written and read, and the resumable training loader."""
