"""What is diffused and what conditions it."""
