import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner

from malora_dist.errors import ConfigError
from malora_dist.launch.ssh.pdsh import env_file_text, handed_on, hosts_command, quoted

WORDS = ["plain", "it's", "a b", 'a "b" \\" c', "$HOME `id` $(id)", "$HOME", "a;b|c&d>e", "*", "", "tab\tline\nend",
         "100%n %h %% %", "ü €", "~", "a\\b", "a \\", "--adapter.r=16", "!x y", "{a,b} [c]"]  # fmt: skip
SHOW = "import sys, os; print(ascii([*sys.argv[1:], *(os.environ.get(n) for n in sys.argv[1:] if n.startswith('V_'))]))"


def pdsh_command(arguments: list[str], exports: dict[str, str]) -> str:
    """What pdsh would hand to the shell of host 0, from deepspeed's own code."""
    args = Namespace(
        user_args=arguments, user_script="m", ssh_port=None, launcher_args="", master_addr="n0", master_port=1,
        venv_script=None, no_python=False, module=True, no_local_rank=False, save_pid=False, enable_each_rank_log="",
    )  # fmt: skip
    pdsh = PDSHRunner(args, "e30=")
    for name, value in exports.items():
        pdsh.add_export(name, value)
    command, _, _ = pdsh.get_cmd({}, {"n0": [0]})
    # pdsh's own replacements.
    text = " ".join(command[6:]).replace("%%", "\0").replace("%h", "n0").replace("%n", "0").replace("%u", "root")
    return text.replace("\0", "%")


def in_a_shell(shell: str, arguments: list[str], exports: dict[str, str]) -> str:
    """What the words and variables are once that shell has read deepspeed's command."""
    text = pdsh_command([quoted(argument) for argument in arguments], exports)
    begins, marker, words = text.partition("-m deepspeed.launcher.launch")
    assert marker, text
    shown = begins.rpartition(sys.executable)[0] + f'"{sys.executable}" -c "{SHOW}" {words.partition("--module m")[2]}'
    done = subprocess.run([shell, "-c", shown], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_words_and_variables_arrive_unharmed(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    values = [word for word in WORDS if word.strip() and "\n" not in word]
    variables = {f"V_{number}": value for number, value in enumerate(values)}
    lines = env_file_text(variables, {}).splitlines()
    exports = dict(line.split("=", maxsplit=1) for line in lines)
    words = [*WORDS, *variables]
    assert in_a_shell(shell, words, exports) == ascii([*words, *values])


def test_deepspeed_reads_the_argv_as_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = hosts_command(
        "malora_dist.train",
        ["r.yaml", "--adapter.r", "16", "a b"],
        hostfile=Path("hosts"),
        selection=["--include", "n0:0"],
        place=["--master_addr", "n0", "--master_port", "7"],
    )
    args = runner.parse_args(command[1:])
    assert (args.hostfile, args.include, args.master_addr, args.master_port) == ("hosts", "n0:0", "n0", 7)
    assert (args.force_multi, args.no_ssh_check, args.launcher, args.module) == (True, True, "pdsh", True)
    assert args.log_level == "error"
    assert (args.user_script, args.user_args) == ("malora_dist.train", ["r.yaml", "--adapter.r", "16", "a b"])


@pytest.mark.parametrize("name", ["my runs", "it's", "100%n", "$HOME"])
def test_a_folder_that_deepspeed_does_not_quote(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match="the deepspeed launcher cannot pass on the path of this folder"):
        hosts_command("m", [], hostfile=Path("hosts"), selection=[], place=[])


def test_what_is_handed_on() -> None:
    given = {"OMP_NUM_THREADS": "1", "HF_HOME": "/h", "TOKENIZERS_PARALLELISM": "false", "PATH": "/bin"}
    kept_back = {"HF_TOKEN": "x", "DS_API_KEY": "x", "DS_ENV_FILE": "f", "RANK": "0", "HOME": "/"}
    kept_back |= {"HF_X": "two\nlines", "TORCH_EMPTY": "", "WANDB_API_KEY": "x", "CUDA_VISIBLE_DEVICES": "1"}
    assert handed_on({**given, **kept_back}) == given


def test_deepspeeds_own_files_have_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("A=1\n\n")
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=8\nB=$HOME")
    assert env_file_text({"OMP_NUM_THREADS": "1"}, {}) == "OMP_NUM_THREADS=1\nA=1\nOMP_NUM_THREADS=8\nB=$HOME\n"
    (tmp_path / "other").write_text("no variable\n")
    with pytest.raises(ConfigError, match="'no variable' is not NAME=VALUE"):
        env_file_text({}, {"DS_ENV_FILE": str(tmp_path / "other")})
