"""The terms of HETA: gate, curvature and information."""
