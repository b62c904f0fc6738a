"""Trained models in memory, and the folders that hold them. Nothing here opens a scan or training data."""
