"""Evaluate a run: open it, draw samples, compare them with real images."""
