"""Pictures in, pictures of maps out: files, models by name, drawing, records."""
