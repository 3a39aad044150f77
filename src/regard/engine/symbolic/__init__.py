"""Elementwise functions as expressions: traced from plain PyTorch functions, differentiated, and printed or run."""

from .expression import ONE, OPS, Expr, Z, const, node, pullback, substitute, topological, var
from .printing import c_lines, triton_lines
from .program import Program
from .trace import Untraceable, trace

__all__ = [
    "ONE",
    "OPS",
    "Expr",
    "Program",
    "Untraceable",
    "Z",
    "c_lines",
    "const",
    "node",
    "pullback",
    "substitute",
    "topological",
    "trace",
    "triton_lines",
    "var",
]
