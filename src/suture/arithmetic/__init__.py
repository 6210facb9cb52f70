"""The base plus amounts of task vectors: what it says, and how vectors disturb each other."""
