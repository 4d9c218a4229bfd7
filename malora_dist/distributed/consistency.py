"""Checks before a model is loaded that all processes have the same versions, recipe and output folder."""

import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

from malora_dist import __version__
from malora_dist.distributed.process_groups import World, gather_lists
from malora_dist.distributed.rank_errors import run_on_rank0
from malora_dist.errors import ConfigError, TopologyError

PACKAGES = ("torch", "deepspeed", "transformers", "bitsandbytes", "triton", "flash_attn")
RECIPE = "the recipe with its settings"
# Of nodes, ranks or values in a message.
SHOWN = 8
# The caches of network file systems may be older than that only where they are set so.
SHARED_SECONDS = 10


def start_facts(config_text: str) -> dict[str, str]:
    """Return versions of packages, and a digest of the resolved recipe, for `check_consistency`."""
    versions = {name: _version(name) for name in PACKAGES}
    return {"malora_dist": __version__, **versions, RECIPE: hashlib.sha256(config_text.encode()).hexdigest()[:16]}


def check_consistency(world: World, facts: Mapping[str, str], node: str | None = None) -> list[str]:
    """Compare the facts of all processes, and count the processes of each node. Every process must call.

    Args:
        world: this process's rank.
        facts: values by name, which must be the same on all processes.
        node: the name of this process's node; None: its host name.

    Returns:
        The node of every rank.

    Raises:
        TopologyError: facts differ (it names the nodes), or nodes have unlike numbers of processes; the same on all.
    """
    found = gather_lists([(node or socket.gethostname(), dict(facts))], world.control)
    nodes = [name for name, _ in found]
    problems = [*_different_facts([facts for _, facts in found], nodes), *_unlike_nodes(nodes)]
    if problems:
        raise TopologyError("\n  ".join(problems))
    return nodes


def check_shared_folder(world: World, folder: Path, nodes: Sequence[str], seconds: float = SHARED_SECONDS) -> None:
    """Check that every node sees a file that rank 0 writes in `folder`, or where that is going to be.

    Args:
        world: this process's rank. Every process must call.
        folder: of the output.
        nodes: the node of every rank.
        seconds: how long a node may take to see the file, which is then removed.

    Raises:
        TopologyError: a node does not see it; on all, with the names of these nodes.
        ConfigError: rank 0 cannot write it; on all.
    """
    if len(set(nodes)) == 1:
        return
    # Of a node, one process looks: thousands at once would keep the file server busy.
    looks = nodes.index(nodes[world.rank]) == world.rank
    with _probe(world, folder) as path:
        place = os.path.abspath(path)
        sees = not looks or _appears(path, seconds)
        answers = gather_lists([(place, sees)], world.control)
    blind = list(dict.fromkeys(nodes[rank] for rank, (_, sees) in enumerate(answers) if not sees))
    if not blind:
        return
    verb = "does" if len(blind) == 1 else "do"
    text = f"{nodes[0]} wrote {answers[0][0]}, which {_some(blind)} {verb} not see"
    elsewhere = {place for place, _ in answers} - {answers[0][0]}
    if elsewhere:
        text += f", looking for {_some(sorted(elsewhere))}: the working folders differ"
    raise TopologyError(
        f"output_dir={folder} is not on a file system that all nodes share: {text}. Give an --output_dir on a network "
        "file system, by its whole path"
    )


@contextmanager
def _probe(world: World, folder: Path) -> Iterator[Path]:
    """Let rank 0 write a file in the folder, or in the nearest one above it that exists, and remove it afterwards."""
    path = run_on_rank0(lambda: _probe_path(folder), world)
    try:
        run_on_rank0(lambda: _touch(path, folder), world)
        yield path
    finally:
        if world.is_main:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _probe_path(folder: Path) -> Path:
    parent = next(parent for parent in (folder, *folder.absolute().parents) if os.path.isdir(parent))
    if not folder.is_absolute():
        # As every process will name it.
        parent = Path(os.path.relpath(parent))
    return parent / f".malora-{uuid4().hex}"


def _touch(path: Path, folder: Path) -> None:
    try:
        path.write_bytes(b"")
    except OSError as error:
        raise ConfigError(f"output_dir={folder}: {path.parent} cannot be written: {error.strerror}") from error


def _appears(path: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
        with suppress(OSError):
            # Reading the folder makes a network file system ask its server again.
            os.listdir(path.parent)
    return True


def _different_facts(facts: Sequence[Mapping[str, str]], nodes: Sequence[str]) -> Iterator[str]:
    for name in dict.fromkeys(name for own in facts for name in own):
        ranks_of: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks_of.setdefault(own.get(name, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            commonest = sorted(ranks_of.items(), key=lambda item: (-len(item[1]), item[1]))
            values = [f"{value} on {_places(ranks, nodes)}" for value, ranks in commonest[:SHOWN]]
            more = f"; and {len(ranks_of) - SHOWN} more values" if len(ranks_of) > SHOWN else ""
            yield f"{name} differs between nodes: {'; '.join(values)}{more}. {_advice(name)}"


def _advice(name: str) -> str:
    if name == "malora_dist" or name in PACKAGES:
        return f"Install the same {name} on all, or use one environment that all nodes share"
    if name == RECIPE:
        return "Start all nodes with the same file and the same --section.key settings"
    return "It must be the same for all"


def _places(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """List the nodes of these ranks, with the ranks where others of the node have another value."""
    of_all, of_these = Counter(nodes), Counter(nodes[rank] for rank in ranks)
    texts = []
    for node, count in of_these.items():
        own = [str(rank) for rank in ranks if nodes[rank] == node] if count < of_all[node] else []
        texts.append(node + (f" (rank{'s' if len(own) > 1 else ''} {_some(own)})" if own else ""))
    return _some(texts)


def _unlike_nodes(nodes: Sequence[str]) -> Iterator[str]:
    nodes_of: dict[int, list[str]] = {}
    for node, count in Counter(nodes).items():
        nodes_of.setdefault(count, []).append(node)
    if len(nodes_of) > 1:
        counts = "; ".join(f"{count} on {_some(names)}" for count, names in sorted(nodes_of.items(), reverse=True))
        yield (
            f"processes differ between nodes: {counts}. Every node must have as many: with Slurm give --gpus-per-node, "
            "not --gpus, and --ntasks-per-node, not --ntasks; in a hostfile give every host the same slots"
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
