"""The language model: the only room that imports Flax or reads and writes Hugging Face files."""
