"""`python -m tests.breaks [NAME ...]`: break the package in one way after another; exit code 1 if one goes unseen."""

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from malora_dist.files.atomic import write_json
from tests.breaks.run import ROOT, Break, Outcome, read_breaks, run_break


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the breaks that are named, or all; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.breaks", description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of breaks, as breaks.yaml has them; default: all")
    parser.add_argument(
        "--jobs", type=int, default=1, help="breaks at a time; those of tests/slurm need the machine alone"
    )
    parser.add_argument("--check", action="store_true", help="only see whether each break can be made")
    parser.add_argument("--json", type=Path, help="file that takes each outcome by the break's name, as it comes")
    given = parser.parse_args(arguments)
    breaks = read_breaks()
    if unknown := set(given.names) - {each.name for each in breaks}:
        parser.error(f"no break is named {', '.join(sorted(unknown))}")
    if problems := [problem for each in breaks for problem in each.problems(ROOT)]:
        print("\n".join(problems), file=sys.stderr)
        return 2
    chosen = [each for each in breaks if not given.names or each.name in given.names]
    return 0 if given.check else _run_all(chosen, given.jobs, given.json)


def _run_all(breaks: Sequence[Break], jobs: int, file: Path | None) -> int:
    unseen = 0
    with ThreadPoolExecutor(jobs) as pool:
        for broken, outcome in zip(breaks, pool.map(run_break, breaks), strict=True):
            _say(broken, outcome)
            unseen += not outcome.caught
            if file is not None:
                _keep(file, broken, outcome)
    print(f"{len(breaks) - unseen} of {len(breaks)} breaks are caught")
    return 1 if unseen else 0


def _say(broken: Break, outcome: Outcome) -> None:
    verdict = f"caught by {outcome.first_failing_test}" if outcome.caught else f"NOT CAUGHT by {' '.join(broken.tests)}"
    print(f"{broken.name}: {verdict} ({outcome.seconds:.0f} s): {outcome.said}", flush=True)


def _keep(file: Path, broken: Break, outcome: Outcome) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, known | {broken.name: outcome.as_dict()})


if __name__ == "__main__":
    sys.exit(main())
