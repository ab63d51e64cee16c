"""Where other programs meet this one: diffusers, and published checkpoints of SiT, REPA and StableVelocity."""
