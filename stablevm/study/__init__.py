"""The comparison of targets and alignment on one data set: several arms, seeds and points of the training."""
