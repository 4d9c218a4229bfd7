import os
import sys
from importlib import import_module

import pytest

from malora_dist.errors import ConfigError
from malora_dist.launch.command import launcher_path
from malora_dist.launch.torchrun import torchrun_command

RECIPE = ["r.yaml", "--adapter.r", "16"]


def test_torchrun_on_one_machine_and_on_several() -> None:
    command = torchrun_command("malora_dist.train", RECIPE, processes=2)
    assert command == "torchrun --standalone --nproc_per_node 2 -m malora_dist.train r.yaml --adapter.r 16".split()
    command = torchrun_command("m", RECIPE, processes=2, nodes=3, node_rank=2, master_addr="n0", master_port=7)
    args = import_module("torch.distributed.run").parse_args(command[1:])
    assert (args.nnodes, args.node_rank, args.master_addr, args.master_port) == ("3", 2, "n0", 7)
    assert (args.nproc_per_node, args.module, args.training_script) == ("2", True, "m")
    assert args.training_script_args == RECIPE
    command = torchrun_command("m", RECIPE, processes=2, master_port=7)
    args = import_module("torch.distributed.run").parse_args(command[1:])
    assert (args.nnodes, args.master_port, args.standalone) == ("1:1", 7, False)
    assert launcher_path("torchrun") == os.path.join(os.path.dirname(sys.executable), "torchrun")
    assert launcher_path("no-such-launcher") == "no-such-launcher"


@pytest.mark.parametrize(
    ("rank", "address", "message"),
    [
        (None, "n0", "node_rank=None: give"),
        (3, "n0", "node_rank=3: give"),
        (0, None, "give --master_addr"),
    ],
)
def test_a_machine_that_torchrun_could_not_place(rank: int | None, address: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        torchrun_command("m", [], processes=2, nodes=3, node_rank=rank, master_addr=address)
