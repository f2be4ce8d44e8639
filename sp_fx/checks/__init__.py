"""Checks that a user can run on an explainer."""
