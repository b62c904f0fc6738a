"""Typed configuration of a run, read from strict YAML: one file a family of models."""
