"""A YAML file that says what to train on what, and the data that it names."""

from hyperadapt.recipes.additions import Additions, load_additions
from hyperadapt.recipes.recipe import Recipe, RecipeError, TaskRecipe, load_recipe

__all__ = ["Additions", "Recipe", "RecipeError", "TaskRecipe", "load_additions", "load_recipe"]
