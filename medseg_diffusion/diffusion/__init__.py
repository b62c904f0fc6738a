"""The mathematics of Gaussian diffusion, from tensors to tensors."""
