"""Published checkpoints of SiT, REPA and StableVelocity, turned into checkpoint folders of this program."""
