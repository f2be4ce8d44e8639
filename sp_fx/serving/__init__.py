"""Packages at work: behind HTTP, and over folders of pictures."""
