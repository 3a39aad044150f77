"""Findings as experiments: functions with parameters that return what they measured."""
