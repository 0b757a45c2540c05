"""Adapters on disk, from anywhere: read, judge, rewrite; only merging needs the base model."""
