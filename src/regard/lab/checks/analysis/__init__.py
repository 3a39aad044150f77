"""Checks of the analysis family."""
