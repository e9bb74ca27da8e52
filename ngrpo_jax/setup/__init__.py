"""Settings -> the parts of a run that training, evaluation and preflight share."""
