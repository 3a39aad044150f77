"""Data: real text that every Python carries, and synthetic tasks with exact answers."""

from .synthetic import copying, recall
from .text import Corpus, python_text, read_text

__all__ = ["Corpus", "copying", "python_text", "read_text", "recall"]
