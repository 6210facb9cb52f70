"""Merge methods: several task vectors in, one out; ``table`` lists them, ``apply`` runs them."""
