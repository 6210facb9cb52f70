"""Fine-tune a model by a strategy into a folder."""
