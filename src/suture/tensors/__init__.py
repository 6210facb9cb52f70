"""Facts about tensors without their values: names, shapes, dtypes, bytes; the roles of weights."""
