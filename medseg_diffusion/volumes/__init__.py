"""Scans between files and tensors, with their geometry."""
