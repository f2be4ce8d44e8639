"""Methods: a captured module, and what runs it: calls, pullbacks, ascents, cuts, calibration."""
