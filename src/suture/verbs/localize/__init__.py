"""Find the entries that carry skills: a folder of masks."""
