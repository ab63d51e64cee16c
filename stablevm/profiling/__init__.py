"""The command `stablevm benchmark`, which measures training steps on this machine."""
