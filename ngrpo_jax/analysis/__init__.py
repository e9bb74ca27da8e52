"""Figures about generations that are already made."""
