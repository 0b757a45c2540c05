"""The benchmark harness: a study in, tables of its runs out; every method makes the same calls."""
