"""The benchmark harness: a study in; one JSON a run out, each run made by the same two calls."""
