"""Sweeps: the command `stablevm sweep`, which evaluates a checkpoint for all combinations of guidance and averages."""
