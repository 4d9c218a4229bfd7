"""What processes of tests need: `tests.processes` imports it once, and every process that it starts has it."""

import gc

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import matplotlib.figure
import matplotlib.patches
import matplotlib.ticker  # noqa: F401
import peft  # noqa: F401
import torch.distributed.tensor  # noqa: F401
import transformers.generation
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import malora_dist.cli.app
import malora_dist.convert
import malora_dist.evaluate
import malora_dist.prepare
import malora_dist.train
import malora_dist.training.evaluation_run  # noqa: F401

# What is here stays: no process that is forked looks through it, which would copy it.
gc.collect()
gc.freeze()
