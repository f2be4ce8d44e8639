"""Maps as figures: `drawing` has the cells, `layouts` figures of several, `animation` moving ones, `showing` what notebooks show;
`map_png` is small and fast; `records` and `demo` explain pictures and write what came of it."""
