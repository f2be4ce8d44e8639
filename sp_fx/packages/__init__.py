"""Packages: a program as one file, `.pt2` or `.onnx`, with its manifest and its probe."""
