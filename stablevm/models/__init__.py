"""Networks: SiT with its projectors and size table, and the small network that judges the handwritten digits."""
