"""Name the files in a run's folder."""

CHECKPOINTS = "checkpoints"
LOCK = ".lock"  # names the process that trains
METRICS = "metrics.jsonl"
VERSIONS = "versions.json"
GRID = "samples.png"
GRIDS = "samples"  # folder of step-NNNNNNNN.png, written during training
CURVES = "curves.png"
REPORT = "report.html"
EVALUATIONS = "eval.json"
FACTS = "facts.json"  # lines at the top of the report
BOARD = "tensorboard"
