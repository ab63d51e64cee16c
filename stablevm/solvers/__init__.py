"""Solvers of the ODE and the SDE from noise to data, and `integrate` for any velocity."""
