"""What softmaxes are used for: where their weights go, and whether they weigh values."""
