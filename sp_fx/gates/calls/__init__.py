"""What graphs call beside gates: copies that may be written over, layouts in memory, calls under an autocast of a model's own."""
