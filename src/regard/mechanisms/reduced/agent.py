"""Agent attention: a few agent tokens gather from the keys and spread to the queries (id 174; Han et al., 2023).

o = softmax(s Q A^T + B2) softmax(s A K^T + B1) V,   A = pooled queries;   rank <= number of agents
"""

from torch import Tensor

from ...algebra import Input, Modified, Relayed, Weighted
from ...catalog.registry import register
from ...engine import attend


def biased(s: Tensor, bias: Tensor) -> Tensor:
    return s + bias


@register("agent-attention")
def agent(agents: int = 49) -> Relayed:
    """agents: how many tokens q is pooled to when the input `agents` (B, H, m, D) is not given. Inputs `gather_bias` (H, m, Lk)
    and `spread_bias` (H, Lq, m) default to 0. The vision module with 2-D pooling, biases and convolution: `regard.nn.AgentAttention`."""
    call = Weighted(position=Modified(biased, (Input("bias", "hqk", default=0.0),)))
    return Relayed(call, call, agents)


def agent_attention(q: Tensor, a: Tensor, k: Tensor, v: Tensor, *, spread_power: float = 1.0, shortcut: float = 0.0) -> Tensor:
    """The functional form on given agents a (B, H, m, D): softmax(s^power Q A^T) softmax(s A K^T) V + shortcut * V, s = D^-1/2.

    AgentSD, the training-free adaptor for diffusion models, uses spread_power = 0.3 and shortcut = 0.075 (then Lq = Lk).
    """
    s = q.shape[-1] ** -0.5
    out = attend(q, a, attend(a, k, v, "softmax"), "softmax", scale=s**spread_power)
    return out + shortcut * v if shortcut else out
