"""Tensors in, tensors out: no model, no text, no host; torch only."""
