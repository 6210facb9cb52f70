"""Write the rows of the harmless refusal policy."""
