"""Put safety that fine-tuning took away back into a model."""
