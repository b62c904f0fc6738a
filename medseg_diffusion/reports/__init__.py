"""Pages and tables from numbers."""
