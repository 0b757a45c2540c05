"""Integrations of the controller into training frameworks."""
