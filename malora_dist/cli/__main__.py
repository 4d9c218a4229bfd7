"""`python -m malora_dist.cli`."""

from malora_dist.cli import main

main()
