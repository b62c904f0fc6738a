"""What several test files need, by topic."""
