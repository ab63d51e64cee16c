"""From a checkpoint to images: guidance, and the command that fills an `.npz`. Importing it does not import torch."""
