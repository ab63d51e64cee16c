"""What a user's own data says about the options of training."""
