"""Stage bench: `malora bench layer` and `step` here: ratios to PEFT, with and without dropout, in all forms."""

import json
import subprocess
import sys

from benchmarks.gpu.measure import GPU
from benchmarks.gpu.verdicts import Verdicts, log_folder

FORMS = "base,peft_lora,lora,malora,malora_grouped" + (",malora_grouped_triton" if GPU else "")
WHOLE = "base,peft_lora,malora"
LAYER = ["--size", "4096,4096x11008" if GPU else "64", "--tokens", "4096" if GPU else "64"]
STEP = ["--model", "random-1b", "--batch", "4", "--length", "1024"]
ROUNDS = ["--repeats", "12" if GPU else "1", "--warmup", "3" if GPU else "0"]
DEVICE = ["--device", "cuda" if GPU else "cpu", "--dtype", "bf16"]


def bench(verdicts: Verdicts, name: str, *arguments: str) -> None:
    """Run one command and show its times, with the ratio to PEFT's LoRA, a line for each case."""
    path = log_folder() / f"bench_{name.replace(' ', '_')}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "malora_dist.cli", "bench", *arguments, *ROUNDS, *DEVICE, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:])
    last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    verdicts.check(name, done.returncode == 0, "".join(last)[:140])
    if done.returncode:
        return
    cases: dict[str, list[str]] = {}
    for record in json.loads(path.read_text())["records"]:
        seconds, ratio = record.get("median_s"), record.get("ratio")
        if seconds is not None:
            text = f"{record['name']} {1e3 * seconds:.2f} ms" + (f" ({ratio:.2f})" if ratio is not None else "")
            cases.setdefault(record["case"], []).append(text)
    for case, texts in cases.items():
        verdicts.log(f"{case}: {', '.join(texts)}")


def main() -> int:
    verdicts = Verdicts()
    for dropout in ("0", "0.05"):
        bench(verdicts, f"layer dropout {dropout}", "layer", "--only", FORMS, "--dropout", dropout, *LAYER)
    for dropout in ("0", "0.05") if GPU else ():
        bench(verdicts, f"step dropout {dropout}", "step", "--only", WHOLE, "--dropout", dropout, *STEP)
    return verdicts.exit_code()


if __name__ == "__main__":
    sys.exit(main())
