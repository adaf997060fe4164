"""Recipes: sets of method settings, their JSON form, and those that come with the package."""
