"""What needs derivatives of a model, or many runs of a part of it."""
