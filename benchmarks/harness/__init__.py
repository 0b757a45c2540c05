"""The benchmark harness: read a study, run every method through the same calls, write tables."""
