"""The language model: the only room that knows Flax and the Hugging Face file format."""
