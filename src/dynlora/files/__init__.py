"""Atomic files and folders, standard JSON, and checked plain values."""
