"""The public functions of ``suture``: the algebra of models, and what every command does."""
