"""What a trace needs to know of the calls that it records, and what stands in for tensors meanwhile."""
