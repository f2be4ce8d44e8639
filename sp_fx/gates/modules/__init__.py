"""Modules of torch.nn with gates inside, as functions that do the same and go back through the rules."""
