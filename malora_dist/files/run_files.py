"""Names of the files and folders in a run's folder."""

CONFIG = "config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
LOG = "train.log"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
EVALUATIONS = "eval.json"
BASELINE = "baseline.json"
# The recipe, base and rows that EVALUATIONS and BASELINE are of, until a checkpoint says so.
MEASURED_ON = "measured_on.json"
# The scores of every question, of the base and of the tuned model.
SCORES = ("scores-base.jsonl", "scores-tuned.jsonl")
REPORT = "report"
EXIT = "exit.json"
# A folder that holds one of these is the folder of a run. Schedulers' files and logs may be there before it.
OF_A_RUN = frozenset(
    (CONFIG, DATA, METRICS, LOG, CHECKPOINTS, ADAPTER, EVALUATIONS, BASELINE, MEASURED_ON, *SCORES, REPORT, EXIT)
)
