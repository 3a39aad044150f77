"""Rows of the family systems, a file each."""
