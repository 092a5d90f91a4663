"""Benchmarks: `speed` times the package beside other programs, `experiments` compares methods on data with wrong labels.

`fmn-ref bench NAME` runs one. Each is a module with the same two or three functions:

- `benchmark(...)` runs it, and writes its result into a folder if one is given. The result is a dictionary that JSON can
  hold. `speed.training` and `experiments.suite` return their tables' text instead, because they write several files.
- `markdown(result)` writes the result as tables. The suite's stands in `experiments.tables`.
- `draw(result, path)` writes the figure, where there is one.

The committed results stand in benchmarks/results/. `markdown` of a committed JSON file gives the committed tables.
"""
