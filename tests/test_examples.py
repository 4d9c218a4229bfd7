"""Every example runs on a tiny model, learns, and leaves an adapter that loads."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from malora_dist import MaloraModel
from tests.e2e import Finished, launch, run_alone
from tests.multiprocess import ROOT
from tests.tiny_models import byte_tokenizer, save_tiny_llama, tiny_llama

RUN = "tests.example_runs:run"
WORDS = ["red", "blue", "one", "two"]
EXAMPLES = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"data"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes in `model`, and rows in `data.jsonl`: each word is to be said again."""
    root = tmp_path_factory.mktemp("examples")
    save_tiny_llama(root / "model", vocab_size=259)
    byte_tokenizer().save_pretrained(root / "model")
    rows = [{"prompt": f"{word}{number}:", "response": f" {word}"} for number in range(4) for word in WORDS]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


def arguments(name: str, folder: Path, output: str, *more: str) -> list[str | Path]:
    rate = ("--learning-rate", "0.005")
    return [ROOT / "examples" / f"{name}.py", folder / "model", folder / "data.jsonl", folder / output, *rate, *more]


def learned(done: Finished, adapter: Path) -> None:
    """The last loss is well below the first, and the adapter is not where it began."""
    assert done.code == 0, done.output
    losses = [float(found) for found in re.findall(r"^epoch \S+ loss (\S+)", done.output, re.MULTILINE)]
    assert len(losses) > 1 and losses[-1] < 0.7 * losses[0], done.output
    model = MaloraModel.from_pretrained(tiny_llama(vocab_size=259), adapter)
    ids = torch.arange(40)[None]
    assert not torch.allclose(model(ids).logits, tiny_llama(vocab_size=259)(ids).logits, atol=1e-2)


@pytest.mark.e2e
def test_plain_loop(folder: Path) -> None:
    done = run_alone(RUN, arguments("plain_loop", folder, "plain", "--epochs", "8"), folder)
    learned(done, folder / "plain")
    assert "trainable params: " in done.output and "red0: " in done.output


@pytest.mark.e2e
def test_trainer_goes_on_from_its_checkpoints(folder: Path) -> None:
    done = run_alone(RUN, arguments("trainer", folder, "trainer", "--epochs", "6"), folder, CUDA_VISIBLE_DEVICES="")
    learned(done, folder / "trainer" / "best")
    again = run_alone(RUN, arguments("trainer", folder, "trainer", "--epochs", "7", "--resume"), folder)
    learned(again, folder / "trainer" / "best")
    # What was trained before is in the log of the second run, and not trained again.
    lines = [line for line in done.output.splitlines() if line.startswith("epoch ")]
    assert [line for line in again.output.splitlines() if line.startswith("epoch ")][: len(lines)] == lines


@pytest.mark.e2e
def test_accelerate_launches_two_processes(folder: Path) -> None:
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    given = arguments("accelerate_loop", folder, "accelerate", "--epochs", "12")
    done = launch(["accelerate", "launch", *options, *given], folder)
    learned(done, folder / "accelerate")
    assert done.output.count("epoch 0:") == 1


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install trl")
def test_sft_trainer(folder: Path) -> None:
    done = run_alone(RUN, arguments("sft_trainer", folder, "sft", "--epochs", "10"), folder)
    learned(done, folder / "sft" / "adapter")
    assert re.search(r"balance 1\.\d+", done.output)


def test_no_example_is_without_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES and all(f'"{name}"' in text for name in EXAMPLES)
