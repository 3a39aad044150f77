"""What a model remembers: entries of transformers' caches, kept, dropped and stored in fewer bytes."""

from .rows import check_dynamic, keep_rows

__all__ = ["check_dynamic", "keep_rows"]
