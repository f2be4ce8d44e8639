"""Checks that a user can run on an explainer: `check.py` has them, `frozen.py` and `coverage.py` what they compare with."""
