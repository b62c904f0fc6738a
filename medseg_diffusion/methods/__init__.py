"""Published methods that use a trained denoiser, one per file."""
