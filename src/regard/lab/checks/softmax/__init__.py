"""Checks of the family softmax, a file for each row."""
