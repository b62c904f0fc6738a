"""Presets: one YAML file per published setting, and small ones that train on two CPU cores."""
