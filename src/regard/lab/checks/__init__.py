"""Checks of the working rows, grouped by shape. Each states a claim, measures it, and measures a control that must fail."""
