"""Training tasks: what a model diffuses, what conditions it, and its loss."""
