"""Judging images: statistics of features, the extractor that makes them, figures and the report."""
