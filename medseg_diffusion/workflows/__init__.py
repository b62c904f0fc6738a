"""The commands as functions, one per file, which read and write the user's files."""
