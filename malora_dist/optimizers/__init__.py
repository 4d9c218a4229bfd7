"""Optimizers that a recipe can name. Importing this folder imports no torch."""
