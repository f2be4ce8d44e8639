"""What graphs call beside gates: copies that may be written over, layouts in memory, calls under an autocast of the model's own."""
