"""What a command prints never decides how it ends, wherever it prints to."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from malora_dist.cli import app as cli
from malora_dist.console.terminal import forgive_output
from tests.e2e import make_folder
from tests.multiprocess import ROOT
from tests.processes import start, wait
from tests.report.run_folder import write_run

NAME = "grün ± 世 [/b]"
TERMINALS = ("ascii", "latin-1", "closed", "broken", "full", "nonblocking")
CLI = "import sys; from malora_dist.cli.app import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a model whose name not every terminal can show, and a run of made-up numbers."""
    folder = make_folder(tmp_path_factory.mktemp("terminal"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = NAME
    recipe["train"] |= {"max_steps": 1, "eval_steps": None, "save_steps": None}
    recipe["evaluation"] = {"base": False, "tuned": True, "batch_tokens": 256}
    (folder / NAME).parent.mkdir()
    (folder / "model").rename(folder / NAME)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    # Of a model that is not here, which is checked without torch.
    elsewhere = recipe | {"model": {"name_or_path": "some/model"}, "output_dir": f"runs/{NAME}"}
    (folder / "elsewhere.yaml").write_text(yaml.safe_dump(elsewhere, allow_unicode=True), encoding="utf-8")
    write_run(folder / "runs" / "made", tasks=[NAME, "b"], steps=20, layers=1)
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("terminal", TERMINALS)
def test_every_command_ends_as_on_a_terminal_that_shows_everything(terminal: str, folder: Path, tmp_path: Path) -> None:
    """In one process: validate, plan, report, inspect, a mistake, and a whole run where output is the least of it."""
    trains = terminal in ("ascii", "broken")
    commands = [
        (["validate", "recipe.yaml"], 0),
        (["validate", "recipe.yaml", "--output_dir", f"runs/{NAME}"], 0),
        (["plan", "recipe.yaml"], 0),
        (["plan", "recipe.yaml", "--json"], 0),
        (["report", "runs/made"], 0),
        (["inspect", NAME], 0),
        (["init", f"{terminal} ± [/x].yaml"], 0),
        (["launch", "status", "--json"], 0),
        (["validate", "recipe.yaml", "--adapter.r", "±"], 2),
        *([(["train", "recipe.yaml", "--num_gpus", "1", "--output_dir", f"runs/{terminal} ±"], 0)] if trains else []),
        *([(["evaluate", f"runs/{terminal} ±", "--num_gpus", "1"], 0)] if trains else []),
    ]
    log, codes = tmp_path / "log", tmp_path / "codes.json"
    work = [terminal, [arguments for arguments, _ in commands], str(codes)]
    assert wait([start("tests.console.test_terminal:run_all", work, log, folder=folder)]) == [0], log.read_text()
    found = json.loads(codes.read_text())
    assert found == [code for _, code in commands], log.read_text(errors="replace")
    if terminal == "ascii":
        shown = log.read_bytes().decode("ascii")
        assert "gr\\xfcn +- \\u4e16 [/b]" in shown and "Traceback" not in shown
    if trains:
        run = folder / "runs" / f"{terminal} ±"
        assert json.loads((run / "exit.json").read_text())["outcome"] == "finished"
        assert NAME in (run / "report" / "index.html").read_text(encoding="utf-8")
        assert "evaluate.log" in {path.name for path in run.iterdir()}


def run_all(terminal: str, commands: Sequence[Sequence[str]], codes: str) -> None:
    """Run commands in a process whose standard files are of this kind, and leave their exit codes in a file."""
    ended: list[int] = []
    for arguments in commands:
        open_terminal(terminal)
        try:
            cli.main(arguments)
        except SystemExit as stop:
            ended.append(int(stop.code or 0))
        Path(codes).write_text(json.dumps(ended))


def open_terminal(kind: str) -> None:
    """Make files 1 and 2, and Python's streams over them, as a program with such a terminal begins."""
    if kind == "closed":
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None  # type: ignore[assignment,misc]
        return
    if kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
    elif kind == "nonblocking":
        reader, writer = os.pipe()
        fill(writer)
        threading.Thread(target=read_slowly, args=[reader], daemon=True).start()
    elif kind == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if kind in ("broken", "full", "nonblocking"):
            os.dup2(writer, number)
        encoding = kind if kind in ("ascii", "latin-1") else "utf-8"
        stream = io.TextIOWrapper(open(number, "wb", closefd=False), encoding=encoding, errors="strict")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def fill(pipe: int) -> None:
    """Leave no room in a pipe, which then tells writers so instead of letting them wait."""
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"\n" * 1024)


def read_slowly(pipe: int) -> None:
    time.sleep(0.2)
    while os.read(pipe, 2**16):
        pass


@pytest.mark.e2e
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("terminal", [*TERMINALS, "C"])
def test_an_interpreter_has_nothing_left_to_say_when_it_ends(terminal: str, unbuffered: str, folder: Path) -> None:
    """What Python cannot write at its end makes its exit code 120."""
    settings = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    if terminal == "C":
        settings |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    elif terminal in ("ascii", "latin-1"):
        settings["PYTHONIOENCODING"] = terminal
    command = f"exec {sys.executable} -c '{CLI}' validate elsewhere.yaml"
    redirected = {"closed": " >&- 2>&-", "full": " >/dev/full 2>&1"}.get(terminal, "")
    reader, writer = os.pipe()
    if terminal == "broken":
        os.close(reader)
    elif terminal == "nonblocking":
        fill(writer)
    done = subprocess.Popen(
        ["sh", "-c", command + redirected], cwd=folder, env=os.environ | settings, stdout=writer, stderr=writer
    )
    os.close(writer)
    if terminal != "broken":
        with open(reader, "rb") as file:
            said = file.read()
        assert b"Traceback" not in said and (b"is valid" in said or redirected)
    assert done.wait(timeout=300) == 0


def test_characters_that_are_not_there_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    forgive_output()
    print("41.3 ± 2.1 → 50 – “grün” 世 \ud83d", flush=True)
    assert written.getvalue() == b'41.3 +- 2.1 -> 50 - "gr\\xfcn" \\u4e16 \\ud83d\n'
