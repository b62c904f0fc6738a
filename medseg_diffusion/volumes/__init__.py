"""Files to tensors and back, with geometry."""
