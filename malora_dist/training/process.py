"""A rank as a process: one clear message and an exit code when it fails, a clean end when it does not."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from malora_dist.console.log import LOGGER
from malora_dist.console.terminal import forgive_output
from malora_dist.errors import ConfigError, DataError, MaloraError, TopologyError
from malora_dist.files.exit_status import EXIT_FAILED, EXIT_MISTAKE, EXIT_OK, EXIT_PREEMPTED
from malora_dist.launch.ranks import place_of
from malora_dist.training.preemption import STOP_SIGNALS, Preempted

# Seconds that ranks other than 0, or with a less useful message, wait before they print an error.
PATIENCE_SECONDS = 5
# Messages of gloo, NCCL and the first process's store when another process is gone or late.
LOST_PEER = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection was likely closed",
    "Broken pipe",
    "NCCL communicator was aborted",
    "remote process exited",
)


def run_as_process(work: Callable[[], None]) -> int:
    """Run a rank's work. Errors are logged to stderr and the run's log.

    A rank that fails ends; its launcher then ends the others, and without a launcher their next collective fails within
    the run's timeout. Errors for people are mostly found by all ranks alike, and then printed by the main one only.

    In a job script of `malora launch slurm` 75 is written to a file, and the process ends with 0.

    Once the work is done, STOP_SIGNALS are ignored from then on: the exit code is decided.

    Returns:
        The exit code (docs/checkpoints.md). 0: done. 75: stopped early, and saved. 2: a mistake in recipe, data or
        topology. 1: any other failure.
    """
    code = EXIT_OK
    forgive_output()
    try:
        try:
            work()
        except Preempted:
            code = EXIT_PREEMPTED
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _leave_groups()
    except MaloraError as error:
        if place_of(os.environ)[0] != 0:
            # Leaving at once would make the launcher end the main rank before it has printed its error.
            time.sleep(PATIENCE_SECONDS)
        log_error("\n  ".join([str(error), *_notes(error)]))
        return _leave(_write_code(code_of(error)))
    except Exception as error:
        lost = _lost_peer(error)
        if lost is None:
            log_error(traceback.format_exc())
        # A process that a launcher ends meanwhile only adds its place in the run to what the others print.
        elif not _told_to_end(PATIENCE_SECONDS) or _notes(error):
            log_error(lost)
        return _leave(code_of(error))
    return _leave(_write_code(code))


def _write_code(code: int) -> int:
    """Write exit codes 2 and 75 to the file $MALORA_EXIT_CODE, for a job script; return the code to exit with.

    Launchers do not pass exit codes on, and take 75 for a crash: they would end the other processes.
    """
    path = os.environ.get("MALORA_EXIT_CODE")
    if not path or code not in (EXIT_MISTAKE, EXIT_PREEMPTED):
        return code
    with suppress(OSError):
        Path(path).write_text(f"{code}\n", encoding="utf-8")
    return EXIT_OK if code == EXIT_PREEMPTED else code


def code_of(error: Exception) -> int:
    """Return the exit code of a process that ends by this error."""
    return EXIT_MISTAKE if isinstance(error, ConfigError | DataError | TopologyError) else EXIT_FAILED


def _lost_peer(error: Exception) -> str | None:
    """Return a sentence if the error only means that another rank was lost, whose message tracebacks would bury."""
    if not isinstance(error, RuntimeError) or not any(words in str(error) for words in LOST_PEER):
        return None
    notes = _notes(error)
    places = "; ".join(notes if any("group" in note for note in notes) else [*notes, _group(error)])
    here = [frame for frame in traceback.extract_tb(error.__traceback__) if "malora_dist" in frame.filename][-1]
    return (
        f"timed out waiting for another process ({places}): it failed, which its own message explains, or took longer "
        f"than parallel.timeout_seconds ({here.name} in {here.filename}:{here.lineno}: {str(error).strip()})"
    )


def _notes(error: Exception) -> list[str]:
    """Return where it happened: the process's place in its run, then the group of processes."""
    return list(reversed(getattr(error, "__notes__", [])))


def _group(error: Exception) -> str:
    """Return the group whose collective failed, as far as the frames of PyTorch and DeepSpeed show it."""
    from torch.distributed import ProcessGroup, get_process_group_ranks, get_world_size

    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        group = frame.f_locals.get("group")
        if isinstance(group, ProcessGroup):
            ranks = get_process_group_ranks(group)
            return "all processes" if len(ranks) == get_world_size() else f"group {ranks}"
    return "a collective of DeepSpeed"


def _told_to_end(seconds: float) -> bool:
    """Wait, and return whether SIGTERM came, as from a launcher that ends all processes because of one."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    until = time.monotonic() + seconds
    while not told and time.monotonic() < until:
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, before)
    return bool(told)


def log_error(message: str) -> None:
    """Log an error of this process, with its rank if there are several, to stderr and the run's log."""
    rank, size = place_of(os.environ)
    where = f"[rank {rank}] " if size > 1 else ""
    logger = logging.getLogger(LOGGER)
    if logger.handlers:
        logger.error("%s%s", where, message)
    else:
        print(f"{where}{message}", file=sys.stderr, flush=True)


def _leave_groups() -> None:
    """Leave the process groups together, so that no rank ends while another still needs it."""
    from malora_dist.distributed.process_groups import stop_processes, wait_for_all

    wait_for_all()
    stop_processes()


def _leave(code: int) -> int:
    """End a launched rank without interpreter shutdown, where gloo's threads now and then abort a finished run."""
    if place_of(os.environ)[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
