"""DuoAttention: streaming heads in training, and which heads retrieve."""

from __future__ import annotations

import torch
from golden.vectors import Vectors, case

import regard
from regard.zoo.systems.duoattention import DuoAttention, streaming


@case("s0", "s1", "s2")
def heads(g: Vectors) -> None:
    g.op(lambda q, k, v: regard.attend(q, k, v, streaming(g["sink"], g["recent"])))


@case("h0", "h1", "h2", "h3", "h4", dtypes=(torch.float64,))
def split(g: Vectors) -> None:
    g.same(DuoAttention(g("gates"), g["sparsity"]).retrieves.double(), "out", 0.0)
