"""Checks that a user can run on an explainer: `check.py`; `frozen_network.py` and `coverage.py` have what they compare with."""
