"""Checks of the family sparse, a file for each row."""
