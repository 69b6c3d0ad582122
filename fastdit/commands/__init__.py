"""Define the commands beside training, sampling, evaluation, encoding and export."""
