"""Data sets of studies, derived from public ones."""
