"""A training run: start, steps, state, metrics, summary."""
