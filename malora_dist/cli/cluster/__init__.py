"""The verbs of `malora launch`: jobs of Slurm, and hosts reached by ssh. Importable without torch."""
