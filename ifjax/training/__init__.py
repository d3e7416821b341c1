"""Quantized training: recipes as records, products quantized by a recipe, and packed optimizer moments (`optim`)."""

from ifjax.training.convolution import quantized_conv
from ifjax.training.product import quantized_dot_general
from ifjax.training.ragged import quantized_ragged_dot
from ifjax.training.recipes import RECIPES, Operand, Product, Recipe, get_recipe

__all__ = [
    "RECIPES", "Operand", "Product", "Recipe", "get_recipe", "quantized_conv", "quantized_dot_general",
    "quantized_ragged_dot",
]  # fmt: skip
