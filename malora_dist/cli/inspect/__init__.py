"""`malora inspect PATH`: what a file or folder is, and what is in it. No pickle is ever opened."""
