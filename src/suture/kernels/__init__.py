"""The inner loops, compiled: what they do, how they are called, where machine code is cached."""
