"""From noise to images: solvers, guidance, and the command that fills an `.npz`. Importing it does not import torch."""
