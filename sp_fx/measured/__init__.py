"""What is measured by running a rewritten graph: is it the model's function, and which axis of its tensors is the sample's."""
