"""Methods that apply a trained denoiser: segmentation, anomaly detection, and what they need."""
