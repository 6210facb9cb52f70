"""The one loop over tensors, block by block, and what is made of it: task vectors, top-k."""
