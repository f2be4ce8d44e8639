"""What graphs call beside gates: copies that may be written over, and calls under an autocast of the model's own."""
