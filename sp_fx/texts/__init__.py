"""Explanations of texts: the share of each token, and its pictures."""
