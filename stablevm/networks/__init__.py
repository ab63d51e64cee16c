"""Networks and their projectors, autoencoders, frozen encoders, and saved networks with the facts of their data."""
