"""The method as pure functions: arrays in, arrays out. Imports nothing of the rest of the project."""
