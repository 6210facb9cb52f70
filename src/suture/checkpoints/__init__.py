"""Tensors in and out: headers, layouts, adapters, quantised files, vocabularies; the writer."""
