"""`regard choose`: which attention for a context, a task, a memory and a device: the shipped study's quality, and costs measured here."""

from ..compare.study import Study, read
from .needs import Needs
from .rank import Choice, choose
from .report import write_report

__all__ = ["Choice", "Needs", "Study", "choose", "read", "write_report"]
