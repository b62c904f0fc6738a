"""The training loop, with its log, resume file and processes."""
