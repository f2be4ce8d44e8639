"""Pictures in, pictures of maps out: `images` and `models` load, `drawing` and `png` draw, `records` and `demo` do both."""
