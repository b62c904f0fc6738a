"""Samplers: one update rule a file, walked over a list of times."""
