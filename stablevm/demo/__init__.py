"""A page in the browser that generates images from a checkpoint."""
