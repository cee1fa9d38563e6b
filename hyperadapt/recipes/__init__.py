"""A YAML file that says what to train on what, and the data that it names."""

from hyperadapt.recipes.recipe import Recipe, RecipeError, TaskRecipe, load_recipe

__all__ = ["Recipe", "RecipeError", "TaskRecipe", "load_recipe"]
