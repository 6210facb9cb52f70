"""Find out where the safety of a model lives."""
