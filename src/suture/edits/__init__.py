"""What an edit is made of: statistics, importance, masks, grafts, patches, and their files."""
