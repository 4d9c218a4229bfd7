"""A rank as a process: one clear message when it fails, a clean end when it does not."""

import os
import sys
import traceback
from collections.abc import Callable

from malora_dist.errors import ConfigError, DataError, MaloraError, TopologyError, TrainingError


def run_as_process(work: Callable[[], None]) -> int:
    """Run a rank's work; 0, or 2 for mistakes in recipe or data, or 1 for anything else, said on stderr.

    What all ranks find out alike is said by the main one only. A rank that fails alone says so and ends; its launcher
    then ends the others, and without a launcher their next collective fails within the run's timeout.
    """
    try:
        work()
    except MaloraError as error:
        alike = isinstance(error, ConfigError | TopologyError | TrainingError)
        if os.environ.get("RANK", "0") == "0" or not alike:
            _say(str(error))
        return _leave(2 if isinstance(error, ConfigError | DataError | TopologyError) else 1)
    except Exception:
        _say(traceback.format_exc())
        return _leave(1)
    return _finish()


def _say(message: str) -> None:
    rank = os.environ.get("RANK")
    where = f"[rank {rank}] " if rank is not None else ""
    print(f"{where}{message}", file=sys.stderr, flush=True)


def _finish() -> int:
    """Leave the process groups together, so that no rank ends while another still needs it."""
    from malora_dist.parallel.groups import stop_processes, wait_for_all

    wait_for_all()
    stop_processes()
    return _leave(0)


def _leave(code: int) -> int:
    """End a launched rank without interpreter shutdown, where gloo's threads now and then abort a finished run."""
    if "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
