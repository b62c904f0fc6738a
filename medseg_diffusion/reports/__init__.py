"""Pages, plots and tables made from numbers."""
