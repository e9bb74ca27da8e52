"""From rewarded trajectories to new parameters."""
