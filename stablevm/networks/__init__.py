"""Networks: SiT, its projectors and sizes; autoencoders and frozen encoders; the snapshot that knows its data."""
