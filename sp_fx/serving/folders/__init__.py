"""Folders of pictures, explained by one package: `batches` cuts and computes them, `jobs` runs them in one process, in several or
under torchrun, `ray_jobs` on Ray's actors; `results` reads what they wrote, and `report` makes the table and the page of it."""
