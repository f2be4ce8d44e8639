"""Gates: the table of adjoints by family, and the dual-path ops that use it."""
