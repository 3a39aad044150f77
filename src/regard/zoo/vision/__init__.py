"""Rows of the family vision, a file each."""
