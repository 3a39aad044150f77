"""Who there is: the registry of named systems, and one record for each of the 307 rows of the catalogue."""

from .axes import names
from .records import Record, records
from .registry import describe, entry, get, register

__all__ = ["Record", "describe", "entry", "get", "names", "records", "register"]
