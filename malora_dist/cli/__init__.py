"""The command `malora`. Importing this imports no torch."""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    from malora_dist.cli.app import main

    main(arguments)
