"""LASP-2: the hybrid's scale, single precision, what is refused."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.lasp_2 import lasp2, lasp2h_attention


def parts(*widths, hosts=3):
    return [[torch.randn(2, 2, 4, width) for _ in range(hosts)] for width in widths]


def test_scale_of_the_hybrid():
    q, k, v = parts(4, 4, 5)
    found = lasp2h_attention(q, k, v, causal=False, scale=0.3)
    s = 0.3 * torch.cat(q, 2) @ torch.cat(k, 2).mT
    assert torch.allclose(torch.cat(found, 2), s.softmax(-1) @ torch.cat(v, 2), atol=1e-6)


def test_a_decay_fades_what_other_hosts_hold():
    """One key at the first token: what later queries read of it falls by exp(-slope) a token, across hosts too."""
    one = torch.zeros(1, 1, 9, 1)
    one[0, 0, 0] = 1
    q, k = torch.ones(1, 1, 9, 1), one
    found = torch.cat(lasp2(*(list(x.chunk(3, 2)) for x in (q, k, k)), slope=torch.tensor([0.5])), 2)
    assert torch.allclose(found[0, 0, :, 0], torch.exp(-0.5 * torch.arange(9.0)), atol=1e-6)
    with pytest.raises(RegardError, match="for causal attention alone"):
        lasp2(*parts(4, 4, 5), causal=False, slope=torch.zeros(2))


def test_parts_that_do_not_fit_are_refused():
    q, k, v = parts(4, 4, 5)
    for bad in ((q[:2], k, v), (q, [*k[:2], k[2][:, :, :3]], v), ([x[0] for x in q],) * 3, (q, k, [x[:, :1] for x in v])):
        with pytest.raises(RegardError, match="expected"):
            lasp2(*bad)
    with pytest.raises(RegardError, match="q as k"):
        lasp2(q, v, v)
    with pytest.raises(RegardError, match=r"slopes \(H,\)"):
        lasp2(q, k, v, slope=torch.zeros(3))
