"""Rows of the family linear, a file each."""
