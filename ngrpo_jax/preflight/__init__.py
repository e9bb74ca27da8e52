"""Whether a run can start and will fit: checked without training anything."""
