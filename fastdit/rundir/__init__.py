"""Read and write what a run leaves behind: file names, checkpoints, metrics, evaluations, the report."""
