"""Bridges from training frameworks to the controller's two calls."""
