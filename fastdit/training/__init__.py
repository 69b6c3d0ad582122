"""Train a run: open a session, take steps, keep the EMAs, write checkpoints."""
