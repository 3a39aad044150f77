"""Comparing, checking and reporting."""

from .verification import Check, Result, checks_of, verify

__all__ = ["Check", "Result", "checks_of", "verify"]
