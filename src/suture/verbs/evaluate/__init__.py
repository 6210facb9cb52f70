"""Ask models what a suite asks; results are files."""
