"""The objects behind the package's public names: models, their results, and metrics of arrays.

Import them from `medseg_diffusion`, not from here.
"""
