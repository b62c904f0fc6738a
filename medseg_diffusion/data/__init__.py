"""Folders of cases to training examples."""
