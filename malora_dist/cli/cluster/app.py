"""`malora launch`: runs on a cluster."""

import typer

from malora_dist.cli.cluster.follow_command import follow
from malora_dist.cli.cluster.hostfile_command import deepspeed_verb, torchrun_verb
from malora_dist.cli.cluster.job_commands import begin_command, end_command
from malora_dist.cli.cluster.status_command import status
from malora_dist.cli.cluster.submit_command import WithFlags, submit_command
from malora_dist.cli.options import OVERRIDES
from malora_dist.launch.schedulers import queues

launch = typer.Typer(help="Start runs on a cluster and monitor them.", no_args_is_help=True)


def add_scheduler(name: str) -> None:
    """Add the command that submits to the queue of a scheduler, under its name."""
    launch.command(name, cls=WithFlags, context_settings=OVERRIDES)(submit_command)


for scheduler in queues():
    add_scheduler(scheduler)
launch.command("status")(status)
launch.command("follow")(follow)
launch.command("deepspeed", context_settings=OVERRIDES)(deepspeed_verb)
launch.command("torchrun", context_settings=OVERRIDES)(torchrun_verb)
launch.command("begin", context_settings=OVERRIDES)(begin_command)
launch.command("end", context_settings=OVERRIDES)(end_command)
