"""Typed configurations of runs, read from strict YAML, with one file per family of models."""
