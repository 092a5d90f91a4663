"""Benchmarks: `speed` times the package beside other programs, `experiments` compares methods under label noise.

`fmn-ref bench NAME` runs one. Each is a module with the same two or three functions:

- `benchmark(...)` runs it and writes its result into a folder, if one is given. It returns the result, a dictionary
  that JSON can hold. `speed.training` and `experiments.suite` return their tables' text instead.
- `markdown(result)` returns the tables. `experiments.tables` has the suite's.
- `draw(result, path)` writes the figure of a benchmark that has one.

The committed results stand in benchmarks/results/. `markdown` of a committed JSON file gives the committed tables.
"""
