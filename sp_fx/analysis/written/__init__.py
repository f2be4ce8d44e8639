"""Functions that a model writes out itself, over several calls: gates, norms, softmaxes, recognised by what they compute."""
