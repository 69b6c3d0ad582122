"""Read and write the files of a run: checkpoints, metrics, evaluations and the report."""
