"""Settings that no row can mean are refused, and the message names what came."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import regard
from regard.nn.decoder import Decoder


def of(slug: str, name: str) -> Any:
    return getattr(importlib.import_module(f"regard.zoo.sparse.{slug.replace('-', '_')}"), name)


def model() -> Decoder:
    return Decoder("softmax", vocab=8, dim=8, layers=2, heads=2)


def x(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("biformer", lambda: of("biformer", "BiFormer")(3, widths=(16,)), "widths"),
    ("biformer", lambda: of("biformer", "region_routes")(x(1, 4, 5, 2), x(1, 4, 5, 2), 2, 1), "regions=2"),
    ("biformer", lambda: of("biformer", "BiLevelRoutingAttention")(8, 2, regions=2, top_k=5), "top_k=5"),
    ("biformer", lambda: of("biformer", "BiLevelRoutingAttention")(8, 2, regions=2)(x(1, 5, 4, 8)), "5 x 4"),
    ("dbsa", lambda: of("dbsa", "DemonstrationCache")(model(), selected=0), "selected=0"),
    ("dbsa", lambda: of("dbsa", "DemonstrationCache")(model(), anchors=-1), "anchors=-1"),
    ("dbsa", lambda: of("dbsa", "DemonstrationCache")(model()).answer(torch.tensor([1])), "encode_once"),
    ("dbsa", lambda: of("dbsa", "DemonstrationCache")(model()).encode_once([torch.tensor([1])], []), "1 groups and 0 texts"),
    ("dbsa", lambda: of("dbsa", "DemonstrationCache")(Decoder("gla", vocab=8, dim=8, layers=1, heads=2)), "rotary"),
    ("delta-attention", lambda: regard.get("delta-attention", stride=0), "stride=0"),
    ("delta-attention", lambda: regard.get("delta-attention", mode="held"), "mode='held'"),
    ("dma", lambda: of("dma", "DynamicMaskAttention")(8, 2, bias="none"), "bias='none'"),
    ("dma", lambda: of("dma", "DynamicMaskAttention")(9, 2), "dim=9"),
    ("dma", lambda: of("dma", "DynamicMaskAttention")(8, 2, smooth=4).step(x(1, 1, 8)), "smooth=4"),
    ("draftattention", lambda: of("draftattention", "schedule")(-1, 0), "step=-1"),
    ("draftattention", lambda: regard.get("draftattention", sparsity=1.5), "sparsity=1.5"),
    ("draftattention", lambda: regard.get("draftattention", sparsity=-0.1), "sparsity=-0.1"),
    ("draftattention", lambda: regard.attend(*[x(1, 1, 9, 4)] * 3, regard.get("draftattention", grid=(1, 4, 4), pool=(2, 2))), "grid"),
    ("flux-attention", lambda: of("flux-attention", "flux_model")(Decoder("mega", vocab=8, dim=8, layers=1, heads=1)), "no Attention"),
    ("fused-neighborhood", lambda: of("fused-neighborhood", "na2d")(*[x(1, 4, 4, 1, 4)] * 3, 3, return_lse=True, backend="naive"), "fused"),
    ("fused-neighborhood", lambda: of("fused-neighborhood", "na1d")(*[x(1, 4, 4, 1, 4)] * 3, 3), "dimensions"),
    ("halonet", lambda: of("halonet", "HaloAttention2d")(8, block=6, stride=4), "stride=4"),
    ("halonet", lambda: of("halonet", "HaloAttention2d")(8, block=4)(x(1, 8, 6, 4)), "6 x 4"),
    ("hip", lambda: of("hip", "CachedHip")(0), "refresh=0"),
    ("hylra", lambda: of("hylra", "ReuseLayers")(None, 0), "count=0"),
    ("hylra", lambda: of("hylra", "ReuseLayers")(None, 4).prompt(0, x(1, 1, 4, 4), x(1, 1, 4, 4), x(1, 1, 4, 4)), "calibrate"),
    ("hylra", lambda: of("hylra", "ReusedIndices")(model(), of("hylra", "ReusePlan")((None,), 0.0), 4), "1 modes for 2"),
    ("landmark-attention", lambda: of("landmark-attention", "LandmarkAttention")(8, 2, places="far"), "places='far'"),
    ("landmark-attention", lambda: of("landmark-attention", "LandmarkAttention")(8, 2, block=0), "block=0"),
    ("landmark-attention", lambda: of("landmark-attention", "LandmarkAttention")(8, 2)(x(1, 5, 8), x(1, 5)), "landmarks"),
    ("longheads", lambda: of("longheads", "LongHeads")(chunk=8, attend_len=16), "attend_len=16"),
    ("ltri-llm", lambda: of("ltri-llm", "LtriStream")(sinks=0), "sinks=0"),
    ("minicpm-sala", lambda: of("minicpm-sala", "infllm")(block_size=24), "block_size=24"),
    ("minicpm-sala", lambda: of("minicpm-sala", "convert")(model(), of("minicpm-sala", "SALAConfig")(layers=3)), "layers=3"),
    ("minicpm-sala", lambda: of("minicpm-sala", "train_stages")(model(), model(), lambda n: x(1), (1, 1, 1)), "long"),
    ("mosa", lambda: of("mosa", "MoSA")(8, 0), "sparse=0"),
    ("nabla", lambda: regard.get("nabla", tile_window=(3, 3)), "tile_window"),
    ("neighborhood", lambda: of("neighborhood", "simulate")((8, 8), (3, 3), (1,), (2, 2), (2, 2)), "a number an axis"),
    ("psa", lambda: regard.attend(*[x(1, 1, 8, 4)] * 3, regard.get("psa", block_size=8), levels=x(1, 1, 1, 1)), "levels"),
    ("hyperattention", lambda: regard.attend(*[x(1, 1, 8, 4)] * 3, regard.get("hyperattention"), draws=x(1, 1, 2)), "draws"),
    ("psa", lambda: regard.get("psa", similarity=(0.7, 0.6)), "three cosines"),
    ("nats", lambda: of("nats", "NAtSAttention")(9, 2), "dim=9"),
    ("pbs-attn", lambda: regard.get("pbs-attn", threshold=0.0), "threshold=0.0"),
    ("pbs-attn", lambda: regard.get("pbs-attn", segment=100), "segment=100"),
    ("powerattention", lambda: of("powerattention", "longnet")((8,), (3,)), "rates"),
    ("proxyattn", lambda: regard.get("proxyattn", block_size=10), "block_size=10"),
    ("psa", lambda: regard.get("psa", mode="best"), "mode='best'"),
    ("psa", lambda: regard.get("psa", tile=0), "tile=0"),
    (
        "recurrent-memory-transformer",
        lambda: of("recurrent-memory-transformer", "RecurrentMemoryBlock")(8, 2, slots=2, written=3),
        "written=3",
    ),
    (
        "recurrent-memory-transformer",
        lambda: of("recurrent-memory-transformer", "RecurrentMemoryBlock")(8, 2, chunk=4)(x(1, 4, 8), first=3),
        "first=3",
    ),
    (
        "recurrent-memory-transformer",
        lambda: of("recurrent-memory-transformer", "RecurrentMemoryBlock")(8, 2, chunk=4, use_global=True)(x(1, 4, 8), first=4),
        "use step",
    ),
    ("routing-transformer", lambda: regard.get("routing-transformer", form="mine"), "form='mine'"),
    ("routing-transformer", lambda: of("routing-transformer", "RoutingAttention")(8, 2, 2, routed=3), "routed=3"),
    ("seerattention", lambda: of("seerattention", "SeerAttention")(2, 2, 8, ratio=0.0), "ratio=0.0"),
    ("seerattention", lambda: of("seerattention", "SeerAttention")(2, 2, 8, last_dense=-1), "last_dense=-1"),
    ("seerattention", lambda: of("seerattention", "AttnGate")(2, 2, 8, k_pools=("mid",)), "k_pools"),
    ("sla", lambda: of("sla", "SparseLinearAttention")(8, feature="cos"), "feature='cos'"),
    ("spargeattn", lambda: of("spargeattn", "sparge_attention")(*[x(1, 1, 8, 4)] * 3, quant="int4"), "quant='int4'"),
    ("sparse-transformer", lambda: regard.get("sparse-transformer", stride=4, count=5), "count=5"),
    ("sparse-transformer", lambda: regard.get("sparse-transformer", integration="sum"), "integration='sum'"),
    ("sparsifiner", lambda: of("sparsifiner", "SparsifinerAttention")(8, 2, 9, keep=0.0), "keep=0.0"),
    (
        "sparsifiner",
        lambda: of("sparsifiner", "SparsifinerAttention")(8, 2, 9)(x(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)),
        "token_mask",
    ),
    ("ssa", lambda: of("ssa", "SSAAttention")(8, 2).use("both"), "mode='both'"),
    ("ssa", lambda: of("ssa", "SSAAttention")(8, 2)(x(1, 4, 8), x(1, 4, 8)), "context"),
    ("superlinear-attention", lambda: of("superlinear-attention", "SuperlinearAttention")(9, 2), "dim=9"),
    ("superlinear-attention", lambda: of("superlinear-attention", "SuperlinearAttention")(8, 2, top=0), "top=0"),
    ("vmoba", lambda: regard.get("vmoba", scope="row"), "scope='row'"),
]


@pytest.mark.parametrize(("slug", "call", "message"), REFUSED, ids=[f"{slug}-{message}" for slug, _, message in REFUSED])
def test_refused(slug: str, call: Callable[[], Any], message: str) -> None:
    with pytest.raises(regard.RegardError) as error:
        call()
    assert message in str(error.value)
