"""Checks of the family systems, a file for each row."""
