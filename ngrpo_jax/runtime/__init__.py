"""Meshes, checkpoints, metrics and preflight checks. Imported by the commands alone."""
