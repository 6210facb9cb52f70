"""Compare fine-tuning strategies by task arithmetic."""
