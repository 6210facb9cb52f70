"""Extract a LoRA adapter from a task vector."""
