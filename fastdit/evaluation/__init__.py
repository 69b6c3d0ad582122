"""Evaluate a run: open it, draw samples, and compare them with real images."""
