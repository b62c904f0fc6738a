"""Training tasks, which define what a model diffuses, what conditions it, and its loss."""
