"""Statistics of graded responses: NumPy arrays in, numbers out."""
