"""The commands of `malora launch`. Importable without torch."""
