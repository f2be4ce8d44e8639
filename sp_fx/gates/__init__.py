"""Gates: the table of adjoints by family, the dual-path ops that use it, and the rules that set its temperatures."""
