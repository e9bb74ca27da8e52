"""Numbers about graded responses: NumPy in, numbers out; no model, no files."""
