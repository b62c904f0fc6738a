"""What one does with a trained denoiser."""
