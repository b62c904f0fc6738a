"""Turns folders of scans and images into training examples."""
