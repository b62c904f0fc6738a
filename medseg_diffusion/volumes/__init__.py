"""Reads scans, label maps and score maps from files, and writes them, with their geometry."""
