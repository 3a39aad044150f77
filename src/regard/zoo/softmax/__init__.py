"""Rows of the family softmax, a file each."""
