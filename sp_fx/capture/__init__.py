"""Capture: a model becomes a graph over an eval clone of its modules."""
