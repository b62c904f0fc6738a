"""A package, so that the "tests" that some dependencies install beside themselves is not mistaken for it."""
