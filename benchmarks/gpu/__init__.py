"""Everything that needs a GPU, in one call: ``python -m benchmarks.gpu --out DIR``.

`stages` says what is done, `runner` does it, each stage in a process of its own under a time limit,
`records` keeps what a stage found, and `report` makes the table at the end.
"""
