"""The graph made ready for a rewrite: calls in place out of place, and what is computed twice computed once."""
