"""Recipes shipped with the package, and the script that fetches what the demo recipe needs."""
