"""Commands that start the processes of a run. Importable without torch."""
