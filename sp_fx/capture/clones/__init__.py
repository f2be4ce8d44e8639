"""Eval clones of a model, and runs that leave the model as it was."""
