"""The toy study: Gaussian mixtures, where the exact field is known in closed form."""
