"""What the commands share: flags, the parts of a run, evaluation, what is said at the end."""
