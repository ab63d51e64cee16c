"""Integrations: schedulers and a pipeline for diffusers, and the import of published checkpoints of SiT and others."""
