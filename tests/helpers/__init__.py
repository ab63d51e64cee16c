"""What tests of several rooms share: small data sets, checkpoints and runs, and programs that kill and damage."""
