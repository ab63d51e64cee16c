"""Where other programs meet this one: diffusers, and published checkpoints of SiT and its successors."""
