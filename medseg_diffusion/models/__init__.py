"""Trained models in memory and the folders that store them, without opening scans or training data."""
