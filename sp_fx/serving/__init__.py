"""Packages at work: behind HTTP (`http` uses `service`, which uses `requests`, `metrics` and `batching`), and over folders of
pictures (`folder_jobs`)."""
