"""Neural networks, in 2D and 3D from the same code."""
