"""One self-contained HTML page of what a folder holds."""
