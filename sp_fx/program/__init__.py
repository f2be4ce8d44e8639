"""Programs: an explanation as one compiled inference graph."""
