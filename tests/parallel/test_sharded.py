"""Layers and models sharded by FSDP2: forward, backward, steps and parameters drawn anew are those of the whole model."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layers import given, make

from regard.nn import Attention, Decoder

COUNT = 2
STEPS = ["dma", "landmark-attention", "lalte", "longvq", "mega", "mta", "nats", "recurrent-memory-transformer", "superlinear-attention"]


def run(shard):
    torch.manual_seed(0)
    layer, x = Attention(16, 2, "gla"), torch.randn(1, 6, 16)
    model, ids = Decoder(["softmax", "deltanet"], vocab=20, dim=16, layers=2, heads=2), torch.randint(20, (1, 6))
    if shard is not None:
        shard(layer)
        for block in model.blocks:
            shard(block)
        shard(model)
    found = [layer(x), model(ids)]
    with torch.no_grad():
        for name in STEPS:
            one = make(name).eval()
            if shard is not None:
                shard(one)
            found.append(one.step(*given(name))[0])
        for one, tokens in ((layer, x), (model, ids)):
            first, state = one.step(tokens[:, :4])
            rest, state = one.step(tokens[:, 4:5], state)
            found += [first, rest, one.step(tokens[:, 5:], state)[0]]
        torch.manual_seed(1)
        for one, inputs in ((layer, (x,)), (make("mega"), given("mega"))):
            if shard is not None and one is not layer:
                shard(one)
            one.reset_parameters()
            found.append(one(*inputs))
    return [out.detach() for out in found]


def host(rank, meeting, found):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT)
    torch.save(run(fully_shard), f"{found}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # FSDP2 keeps gloo's threads, and one that meets the end of the interpreter aborts the process


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_sharded_equals_whole(tmp_path):
    mp.spawn(host, (tmp_path / "meeting", tmp_path), nprocs=COUNT)
    truth = run(None)
    for rank in range(COUNT):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found) == len(truth) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, truth, strict=True))
