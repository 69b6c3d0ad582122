"""Commands beside training, sampling, evaluation, encoding and export."""
