"""`malora launch`: runs on a cluster."""

import typer

from malora_dist.cli.cluster.follow_command import follow
from malora_dist.cli.cluster.hostfile_command import deepspeed_verb, torchrun_verb
from malora_dist.cli.cluster.job_commands import begin_command, end_command
from malora_dist.cli.cluster.slurm_command import WithFlags, slurm_command
from malora_dist.cli.cluster.status_command import status

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

launch = typer.Typer(help="Start runs on a cluster, and see how they fare.", no_args_is_help=True)
launch.command("slurm", cls=WithFlags, context_settings=OVERRIDES)(slurm_command)
launch.command("status")(status)
launch.command("follow")(follow)
launch.command("deepspeed", context_settings=OVERRIDES)(deepspeed_verb)
launch.command("torchrun", context_settings=OVERRIDES)(torchrun_verb)
launch.command("begin", context_settings=OVERRIDES)(begin_command)
launch.command("end", context_settings=OVERRIDES)(end_command)
