"""Training SiT networks: configuration, trainer, moving average, checkpoints, trackers."""
