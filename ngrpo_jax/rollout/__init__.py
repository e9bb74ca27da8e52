"""From prompts to trajectories: compiled decoding, its scheduler, and what it records."""
