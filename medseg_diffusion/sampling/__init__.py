"""Samplers with one update rule per file, applied along a list of times."""
