"""From a captured module to its inference graph: folded, traced, decomposed."""
