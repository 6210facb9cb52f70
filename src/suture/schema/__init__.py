"""What users write, checked: parameters of methods, the tables of methods, recipes.

Nothing here imports numpy or torch: a recipe is read, and its faults are told, without them.
"""
