"""Results of experiments draw what they measured."""

import torch

from regard.zoo.linear import mamba_rank_analysis as mixing
from regard.zoo.linear import minimax_m1 as policy
from regard.zoo.softmax import attention_sink as sinks
from regard.zoo.softmax import localist_recruitment as recruitment
from regard.zoo.softmax import normalization_limits as limits
from regard.zoo.softmax import sinkformer as flow


def test_plots_are_svg_with_their_lines():
    torch.manual_seed(0)
    m = torch.randn(4, 4)
    found = [
        flow.attention_flow(torch.randn(6, 4), m + m.T, iterations=3, steps=3),
        limits.attention_limits(torch.randn(64)),
        recruitment.recruit(torch.randn(40, 4)),
        mixing.rank_report(torch.randn(16, 16)),
        policy.PolicyRun((0.1, 0.4), "cispo"),
        sinks.SinkResult((0.1,), 0.5, 3.0, 1.0, (2.0, 1.0)),
    ]
    assert all(one.plot().startswith("<svg") and "</svg>" in one.plot() for one in found)
