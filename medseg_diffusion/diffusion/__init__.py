"""Mathematics of Gaussian diffusion: torch in, torch out."""
