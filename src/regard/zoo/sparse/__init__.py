"""Rows of the family sparse, a file each."""
