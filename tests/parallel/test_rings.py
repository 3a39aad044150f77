"""LASP-2 and ring self-attention over processes equal virtual hosts, in values, gradients and numbers sent; bad input."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from regard import RegardError
from regard.parallel import (
    Counted,
    ProcessHosts,
    VirtualHosts,
    lasp2,
    lasp2h_attention,
    linformer_ring_attention,
    ring_self_attention,
    shares,
)

COUNT = 2


def answers(hosts, mine):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 12, d, dtype=torch.float64) for d in (4, 4, 5))
    e = torch.randn(6, 12, dtype=torch.float64)
    slope, found, sent = torch.tensor([0.0, 0.2, 0.9], dtype=torch.float64), [], []
    for run in (
        lambda q, k, v, e, hosts: lasp2(q, k, v, hosts),
        lambda q, k, v, e, hosts: lasp2(q, k, v, hosts, slope=slope),
        lambda q, k, v, e, hosts: lasp2h_attention(q, k, v, hosts),
        lambda q, k, v, e, hosts: ring_self_attention(q, k, v, hosts, causal=True),
        lambda q, k, v, e, hosts: linformer_ring_attention(q, k, v, e, e, hosts),
    ):
        cut = [
            [x.clone().requires_grad_() for at, x in enumerate(shares(x, COUNT, d)) if at in mine]
            for x, d in ((q, 2), (k, 2), (v, 2), (e, 1))
        ]
        counted = Counted(hosts)
        outs = run(*cut, counted)
        sum((out.square() * (1 + at)).sum() for at, out in zip(mine, outs)).backward()
        found.append([[x.detach() for x in outs], *[[x.grad for x in one if x.grad is not None] for one in cut]])
        sent.append(dict(counted.sent))
    return found, sent


def host(rank, meeting, folder):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT)
    torch.save(answers(ProcessHosts(), [rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_processes_equal_virtual_hosts(tmp_path):
    mp.spawn(host, (tmp_path / "meeting", tmp_path), nprocs=COUNT)
    truth, sent = answers(VirtualHosts(COUNT), [0, 1])
    for rank in range(COUNT):
        found, other = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert other == sent
        for one, whole in zip(found, truth):
            for a, b in zip(one, whole):
                assert len(a) == (1 if b else 0) and all(torch.allclose(x, b[rank], atol=1e-12) for x in a)


def test_bad_input():
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(RegardError, match="expected a multiple"):
        shares(x, 4)
    for run in (lasp2, lasp2h_attention, ring_self_attention):
        for bad in (([], [], []), ([x, x], [x], [x]), ([x, x[:, :, :3]], [x, x], [x, x])):
            with pytest.raises(RegardError, match="expected"):
                run(*bad)
        with pytest.raises(RegardError, match="for 3 hosts"):
            run([x], [x], [x], VirtualHosts(3))
    for options in ({"slope": torch.ones(3)}, {"slope": torch.ones(2), "causal": False}):
        with pytest.raises(RegardError, match=r"slopes \(H,\)"):
            lasp2([x], [x], [x], **options)
    with pytest.raises(RegardError, match="C its tokens"):
        linformer_ring_attention([x], [x], [x], [torch.ones(3, 5)], [torch.ones(3, 6)])


def test_half_precision_and_one_host():
    x = torch.randn(1, 2, 8, 4)
    for run in (lasp2, lasp2h_attention, ring_self_attention):
        half = run(*([part.bfloat16() for part in shares(x, 2)] for _ in range(3)))
        whole = run([x], [x], [x])[0]
        assert half[0].dtype == torch.bfloat16 and (torch.cat(half, 2).float() - whole).abs().max() < 0.1 * whole.abs().max().clamp_min(1)
