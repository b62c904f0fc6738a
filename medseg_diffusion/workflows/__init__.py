"""One command, one file: each reads and writes the user's files, and is called by the command of its name."""
