"""Training a network: options, the trainer and its engine, checkpoints, metrics. `trainer.train` is where to begin."""
