"""Neural networks, 2D and 3D from the same code."""
