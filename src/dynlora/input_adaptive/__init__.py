"""Ranks per example: each example uses the components that its complexity needs."""
