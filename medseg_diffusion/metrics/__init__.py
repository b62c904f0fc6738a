"""Scores computed from arrays, and statistics of scores over cases."""
