"""Checks of the family linear, a file for each row."""
