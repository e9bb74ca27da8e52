"""Problems, prompts and rewards: everything that is text."""
