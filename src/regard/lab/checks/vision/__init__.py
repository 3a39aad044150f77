"""Checks of the family vision, a file for each row."""
