"""Quantized training: recipes as records, the product that they describe, packed optimizer moments (`optim`)."""

from ifjax.training.product import quantized_dot_general
from ifjax.training.recipes import RECIPES, Operand, Product, Recipe, get_recipe

__all__ = ["RECIPES", "Operand", "Product", "Recipe", "get_recipe", "quantized_dot_general"]
