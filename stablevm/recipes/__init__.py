"""Recipes: a small file of options for each published or measured setting, and what it is expected to reach."""
