"""The entry point `deepspeed --module malora_dist.evaluate RUN`: `malora evaluate RUN` in a launched process."""

import sys
from collections.abc import Sequence

from malora_dist.cli.entry_point import run_malora


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `malora evaluate` in this process; return its exit code: 0, 1 for a failure, 2 for a mistake."""
    return run_malora(["evaluate"], arguments)


if __name__ == "__main__":
    sys.exit(main())
