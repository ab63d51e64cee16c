"""Training networks: options, trainer, engine, checkpoints and metrics; start reading at `trainer.train`."""
