"""Sentence attention, and the net around it on strided convolutions."""

from __future__ import annotations

from golden.vectors import Vectors, case
from torch import nn

from regard.zoo.vision.sentence_attention_block import AnswerGrounder, SentenceAttention


@case("a0", "a1")
def attention(g: Vectors) -> None:
    made, leaves = SentenceAttention(3, 5).to(g.dtype), g.leaves("x", "text")
    parameters = g.fill(made, ("net", "attention"))
    out = made(**leaves)
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)


@case("n0", "n1")
def net(g: Vectors) -> None:
    stages = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 4), (4, 5), (5, 6))]
    made, leaves = AnswerGrounder(stages, (4, 5, 6), 3, dropout=0.0).to(g.dtype), g.leaves("x", "text")
    names = [("image_norm", "init_norm"), ("^stages", "backbone.stages"), (r"attentions\.(\d)\.net", r"sentence_attentions.\1.attention")]
    names += [(r"merges\.(\d)", r"merge_blocks.\1.low_res_conv"), ("^head", "classifier")]
    parameters = g.fill(made, *names)
    out = made(leaves["x"], leaves["text"])
    g.same(out, "out")
    g.gradients(g.weigh(out), leaves | parameters)
    g.moved(made, *names)
