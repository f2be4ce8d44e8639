"""Pictures in, pictures of maps out: `images` and `models` load, `drawing` and `map_png` draw, `records` and `demo` do both."""
