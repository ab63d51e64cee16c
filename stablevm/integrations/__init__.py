"""Integrations: a scheduler for diffusers, and the import of published checkpoints of SiT and its successors."""
