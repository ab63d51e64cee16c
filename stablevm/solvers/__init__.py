"""From noise to data: solvers of the ODE and the SDE, and `integrate` for any velocity."""
