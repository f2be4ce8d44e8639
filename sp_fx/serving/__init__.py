"""Packages at work: behind HTTP (`http` < `service` < `requests`, `metrics`, `batching`) and over folders (`batch_jobs`)."""
