"""Names inside a run's folder."""

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
VERSIONS = "versions.json"
GRID = "samples.png"
GRIDS = "samples"  # step-NNNNNNNN.png, during training
CURVES = "curves.png"
REPORT = "report.html"
EVALUATIONS = "eval.json"
FACTS = "facts.json"  # the figures at the top of the report
BOARD = "tensorboard"
