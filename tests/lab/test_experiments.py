"""Results of experiments draw what they measured."""

import torch

from regard.lab.experiments import flow, limits, mixing, policy, recruitment, sinks


def test_plots_are_svg_with_their_lines():
    torch.manual_seed(0)
    m = torch.randn(4, 4)
    found = [
        flow.attention_flow(torch.randn(6, 4), m + m.T, iterations=3, steps=3),
        limits.attention_limits(torch.randn(64)),
        recruitment.recruit(torch.randn(40, 4)),
        mixing.rank_report(torch.randn(16, 16)),
        policy.PolicyRun((0.1, 0.4), "cispo"),
        sinks.SinkResult(0.1, 0.5, 3.0, 1.0, (2.0, 1.0)),
    ]
    assert all(one.plot().startswith("<svg") and "</svg>" in one.plot() for one in found)
