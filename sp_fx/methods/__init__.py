"""Methods: a captured module, and what runs it: requests and pullbacks, ascents, cuts at inner layers, calibration."""
