"""Networks and their sizes; projectors, autoencoders and frozen encoders; the snapshot that knows its data."""
