"""Every option of a sparse row's layers reaches the place that it is of, and what has no option is as the papers' code has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inspected import dropped, eps, plain, spread, widths
from torch import nn

from regard.nn import Attention
from regard.zoo.sparse.alternating_sparse_attention import GlobalLatentAttention, LocalLatentAttention, asa_layers
from regard.zoo.sparse.biformer import BiFormer, BiFormerBlock, BiLevelRoutingAttention
from regard.zoo.sparse.dhsa import BoundaryPredictor
from regard.zoo.sparse.dma import DynamicMaskAttention
from regard.zoo.sparse.flash_window_attention import SwinWindowAttention
from regard.zoo.sparse.flashmoba import KeyConv
from regard.zoo.sparse.flux_attention import FluxAttention, LayerRouter, SparsityController
from regard.zoo.sparse.fused_neighborhood import NeighborhoodAttention2D
from regard.zoo.sparse.halonet import HaloAttention2d, HaloBlock, HaloNet
from regard.zoo.sparse.hip import CachedHip
from regard.zoo.sparse.landmark_attention import LandmarkAttention
from regard.zoo.sparse.longheads import LongHeads
from regard.zoo.sparse.ltri_llm import Ltri, LtriStream
from regard.zoo.sparse.minicpm_sala import SALAConfig, build_sala, infllm, sala_lightning
from regard.zoo.sparse.mosa import MoSA
from regard.zoo.sparse.nats import NAtSAttention
from regard.zoo.sparse.recurrent_memory_transformer import RecurrentMemoryBlock
from regard.zoo.sparse.routing_transformer import RoutingAttention, routing
from regard.zoo.sparse.seerattention import AttnGate, SeerAttention
from regard.zoo.sparse.sla import SparseLinearAttention
from regard.zoo.sparse.sparse_transformer import SparseBlock, position_embedding
from regard.zoo.sparse.sparsifiner import SparsifinerAttention
from regard.zoo.sparse.ssa import SSAAttention
from regard.zoo.sparse.superlinear_attention import SuperlinearAttention


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters that are no layers'."""
    return {name: tuple(p.shape) for name, p in net.named_parameters() if "." not in name}


def largest(name: str) -> Callable[[nn.Module], float]:
    return lambda net: float(dict(net.named_parameters())[name].detach().abs().max())


Case = tuple[str, Callable[[], Any], Callable[[Any], Any], Any]
CASES: list[Case] = [
    ("alternating-sparse-attention", lambda: LocalLatentAttention(16, 4), lambda n: (plain(n), n.scale, n.head_dim, n.groups), (["q", "down", "out", "q_rope", "k_rope"], 20**-0.5, 4, 1)),
    ("alternating-sparse-attention", lambda: LocalLatentAttention(16, 4, head_dim=6, rank=5, rope_dim=4, window=3), lambda n: (shapes(n), widths(n), n.scale, n.window), ({"up_k": (4, 5, 6), "up_v": (4, 5, 6)}, [(16, 24), (16, 5), (24, 16), (16, 16), (16, 4)], 10**-0.5, 3)),
    ("alternating-sparse-attention", lambda: GlobalLatentAttention(16, 4, groups=2), lambda n: (plain(n), n.rank, n.groups, n.norm.normalized_shape), (["q", "down", "out"], 8, 2, (8,))),
    ("alternating-sparse-attention", lambda: asa_layers(3, 16, 4, window=5, groups=2, size=4, stride=2, block_size=8, top_k=3, rope_dim=6), lambda n: [type(x).__name__[:5] for x in n] + [n[0].window, n[0].rank, n[0].k_rope.out_features, n[1].groups, n[1].size, n[1].stride, n[1].block_size, n[1].top_k, n[1].rank], ["Local", "Globa", "Local", 5, 8, 6, 2, 4, 2, 8, 3, 8]),
    ("biformer", lambda: BiLevelRoutingAttention(16, 2, regions=2, top_k=2), lambda n: (plain(n), n.scale, n.lepe.kernel_size, n.lepe.padding, n.lepe.groups, type(n.router)), ([], 0.25, (5, 5), (2, 2), 16, nn.Identity)),
    ("biformer", lambda: BiLevelRoutingAttention(16, 2, regions=2, top_k=2, qk_dim=4, lepe=0, param_routing=True, scale=0.3), lambda n: (widths(n), n.scale, n.lepe), ([(16, 24), (16, 16), (4, 4)], 0.3, None)),
    ("biformer", lambda: BiFormerBlock(16, 2, regions=3, top_k=5, ratio=2), lambda n: (widths(n.mlp), n.mixer.regions, n.mixer.top_k, n.place.groups, n.place.padding), ([(16, 32), (32, 16)], 3, 5, 16, (1, 1))),
    ("biformer", lambda: BiFormer(3, channels=2, widths=(8, 16), depths=(1, 2), top_ks=(2, 3), head_dim=4, ratio=1, stem=3), lambda n: ([(m.in_channels, m.kernel_size[0], m.stride[0]) for m in n.merges], [[(b.mixer.heads, b.mixer.top_k, widths(b.mlp)) for b in stage] for stage in n.stages]), ([(2, 3, 3), (8, 2, 2)], [[(2, 2, [(8, 8), (8, 8)])], [(4, 3, [(16, 16), (16, 16)])] * 2])),
    ("dhsa", lambda: BoundaryPredictor(12, 3, 8, "conv", 6), lambda n: (n.depth.groups, n.depth.kernel_size, widths(n), n.mix, n.norm), (12, (3,), [(12, 8), (33, 6), (6, 1)], None, None)),
    ("dhsa", lambda: BoundaryPredictor(12, 3, 8, "attention", 6, 2), lambda n: (n.depth, n.mix.num_heads, n.mix.batch_first, n.norm.normalized_shape), (None, 2, True, (8,))),
    ("dma", lambda: DynamicMaskAttention(16, 4, 2), lambda n: (plain(n), eps(n), largest("strength")(n), n.dt.in_features, n.dt.out_features, n.rope.base), (["q", "out", "k", "v"], {1e-6}, 0.0, 8, 2, 1e4)),
    ("dma", lambda: DynamicMaskAttention(16, 4, head_dim=3, norm_eps=0.1, dt_bias=False, base=50.0), lambda n: (plain(n), eps(n), n.width, n.kv_heads, n.rope.base), (["q", "out", "k", "v", "dt"], {0.1}, 3, 4, 50.0)),
    ("dma", lambda: DynamicMaskAttention(16, 4, rope=False), lambda n: n.rope, None),
    ("flash-window-attention", lambda: SwinWindowAttention(16, 2, 3, 1, chunk=5), lambda n: (plain(n), n.table.shape, n.chunk, n.flash), ([], (25, 2), 5, True)),
    ("flashmoba", lambda: KeyConv(2, 4, 5), lambda n: (shapes(n), largest("taps")(n)), ({"taps": (2, 5, 4)}, 0.0)),
    ("flux-attention", lambda: LayerRouter(4, 7, 2.0), lambda n: (n.ends, widths(n), n.mlp[-1].weight.abs().max().item(), n.mlp[-1].bias.tolist()), (7, [(4, 32), (32, 8), (8, 16), (16, 4), (4, 2)], 0.0, [0.0, 2.0])),
    ("flux-attention", lambda: FluxAttention(Attention(16, 4), sinks=3, window=5, ends=7), lambda n: (n.sinks, n.window, n.router.ends, n.tau, n.decide, n.z, n.router.features[0].in_features), (3, 5, 7, 1.0, None, None, 4)),
    ("flux-attention", lambda: SparsityController({"a": 0.25, "b": 0.5}), lambda n: (n.targets.tolist(), n.tasks, n.multipliers.shape, bool((n.multipliers >= 0).all()), bool((n.multipliers <= 0.5).all())), ([0.25, 0.5], {"a": 0, "b": 1}, (2, 2), True, True)),
    ("fused-neighborhood", lambda: NeighborhoodAttention2D(16, 2, (3, 5), dilation=2, causal=True, bias=True), lambda n: (plain(n), shapes(n), n.dilation, n.causal), ([], {"bias": (2, 45)}, 2, True)),
    ("fused-neighborhood", lambda: NeighborhoodAttention2D(16, 2), lambda n: (shapes(n), n.kernel_size), ({}, 7)),
    ("halonet", lambda: HaloAttention2d(16, heads=2, block=4, halo=1), lambda n: (plain(n), n.head_dim, n.value_dim, type(n.project), shapes(n)), (["q", "kv"], 16, 8, nn.Identity, {"rel_h": (11, 16), "rel_w": (11, 16)})),
    ("halonet", lambda: HaloAttention2d(16, 10, 2, block=4, value_dim=3, bias=True, head_dim=4), lambda n: (plain(n), n.project.in_channels, n.project.out_channels), (["project"], 6, 10)),
    ("halonet", lambda: HaloAttention2d(16, heads=2, block=4, project=True), lambda n: n.project.bias is None, False),
    ("halonet", lambda: HaloAttention2d(16, heads=2, block=4, stride=2, pool=True), lambda n: (n.stride, n.pool), (1, 2)),
    ("halonet", lambda: HaloAttention2d(16, heads=2, block=4, stride=2), lambda n: (n.stride, n.pool, n.step_of_query), (2, 1, 2)),
    ("halonet", lambda: HaloAttention2d(16, heads=2, block=4, stride=2, steps="queries"), lambda n: n.step_of_query, 1),
    ("halonet", lambda: HaloBlock(8, 16, ratio=4, heads=2, block=4, halo=1, stride=2), lambda n: (plain(n), n.body[3].heads, n.body[3].halo, n.body[3].stride, n.body[0].out_channels, n.skip[0].stride), (["body.0", "body.3.q", "body.3.kv", "body.6", "skip.0"], 2, 1, 2, 4, (2, 2))),
    ("halonet", lambda: HaloBlock(8, 8, heads=2, block=4), lambda n: type(n.skip), nn.Identity),
    ("halonet", lambda: HaloNet(3, 2, (8, 16, 16), block=4, halo=2), lambda n: (n.stem.in_channels, n.stem.bias, [(b.body[3].stride, b.body[3].block, b.body[3].halo, type(b.skip)) for b in n.stages]), (2, None, [(1, 4, 2, nn.Identity), (2, 4, 2, nn.Sequential), (2, 4, 2, nn.Sequential)])),
    ("hip", lambda: CachedHip(3, mask_k=8, block_k=4, sinks=1, window=5, representative="middle"), lambda n: (n.refresh, n.block_k, n.sinks, n.window, n.rest, n.descents), (3, 4, 1, 5, {"mask_k": 8, "block_q": 1, "query_stride": 1, "representative": "middle"}, 0)),
    ("landmark-attention", lambda: LandmarkAttention(16, 2), lambda n: (plain(n), n.block, n.rope is None), (["qkv", "out"], 63, False)),
    ("landmark-attention", lambda: LandmarkAttention(16, 2, bias=True, rope=False), lambda n: (plain(n), n.rope), ([], None)),
    ("longheads", lambda: LongHeads(4, 20, released=True), lambda n: (n.chunk, n.attend_len, n.chunks, n.released, n.rotated), (4, 20, 5, True, False)),
    ("ltri-llm", lambda: Ltri(7, window=5, shortest=3), lambda n: (n.rotated, n.chunk, n.options), (False, 7, {"window": 5, "shortest": 3})),
    ("ltri-llm", lambda: LtriStream(shortest=3, longest=9), lambda n: (n.limits, n.first, n.read, n.index.heads, n.index.resident_after), ((3, 9), 0, [], None, 8)),
    ("minicpm-sala", lambda: SALAConfig(block_size=8, top_k=2, window=6, dense_len=9, kernel=4, stride=2).sparse(), lambda m: m == infllm(8, 2, 6, 9, 4, 2) and m != infllm(8, 2, 6, 9, 8, 2), True),
    ("minicpm-sala", lambda: infllm(), lambda m: (m.recipe.qk_norm, m.recipe.out_gate, m.recipe.rope), ("rms", "sigmoid", False)),
    ("minicpm-sala", lambda: sala_lightning(1, 4), lambda m: (m.recipe.qk_norm, m.recipe.out_norm, m.recipe.out_gate, m.recipe.rope), ("rms", "rms", "sigmoid", True)),
    ("minicpm-sala", lambda: build_sala(SALAConfig(vocab=7, dim=16, layers=5, heads=4, kv_heads=2, share=0.6)), lambda n: ([type(b.mixer.mechanism).__name__ for b in n.blocks], {b.mixer.k.out_features for b in n.blocks}, n.embed.num_embeddings), (["Weighted", "Recurrent", "Weighted", "Recurrent", "Weighted"], {8}, 7)),
    ("mosa", lambda: MoSA(16, 3, 2, head_dim=8), lambda n: (plain(n), widths(n), shapes(n)), (["dense_qkv", "dense_out"], [(16, 48), (16, 16)], {"router": (3, 16), "qkv": (3, 3, 16, 8), "out": (3, 8, 16)})),
    ("mosa", lambda: MoSA(16, 3), lambda n: (n.dense_qkv, n.dense_out), (None, None)),
    ("nats", lambda: NAtSAttention(16, 4, 2), lambda n: (plain(n), n.types.out_features, n.window, n.tau), (["q", "out", "k", "v"], 6, 64, 1.0)),
    ("recurrent-memory-transformer", lambda: RecurrentMemoryBlock(16, 3 + 1, slots=5, use_global=True, rope_bases=(10.0, 80.0)), lambda n: (plain(n), largest("bias")(n), largest("mix")(n), [round(r.base, 6) for r in n.ropes], shapes(n)), (["qkv", "out"], 0.0, 0.0, [10.0, 20.0, 40.0, 80.0], {"bias": (4, 5), "mix": (4,)})),
    ("recurrent-memory-transformer", lambda: RecurrentMemoryBlock(16, 1), lambda n: ([r.base for r in n.ropes], n.mix, widths(n.gate)), ([1e3], None, [(64, 1)])),
    ("routing-transformer", lambda: RoutingAttention(16, 4, 3, members=5, window=7, decay=0.5, commitment=0.1), lambda n: (plain(n), n.routed, n.mechanism.members, n.mechanism.shared, n.window, n.decay, n.commitment, n.centroids.shape), (["qkv", "out"], 2, 5, True, 7, 0.5, 0.1, (2, 3, 4))),
    ("routing-transformer", lambda: [routing(form=form, shared=True) for form in ("paper", "google", "port")], lambda made: [(m.count_eps, m.scaled, m.hide_self) for m in made] + [m.norm_eps for m in made[:2]], [(0.0, True, True), (1e-2, False, False), (1e-5, True, True), 1e-5, 1e-6]),
    ("routing-transformer", lambda: [routing(form=form, shared=shared) for form in ("paper", "google", "port") for shared in (False, True)], lambda made: [(m.route, m.queries, m.keys) for m in made], [("layer+unit",) * 3] * 2 + [("layer",) * 3] * 2 + [("unit", "", ""), ("unit", "", "unit")]),
    ("routing-transformer", lambda: routing(form="google", shared=True, scaled=True, hide_self=True, count_eps=0.5, norm_eps=0.25, members=3, clusters=2), lambda m: (m.scaled, m.hide_self, m.count_eps, m.norm_eps, m.members, m.clusters), (True, True, 0.5, 0.25, 3, 2)),
    ("routing-transformer", lambda: routing(), lambda m: (m.hide_self, m.clusters, m.members), (False, 8, None)),
    ("routing-transformer", lambda: RoutingAttention(16, 4, 3, routed=1), lambda n: bool(torch.allclose(n.centroids.norm(dim=-1), torch.ones(1, 3))), True),
    ("seerattention", lambda: AttnGate(4, 2, 8, width=6, q_pools=("max", "avg"), k_pools=("min",), base=50.0), lambda n: (shapes(n), n.rope.base), ({"q": (4, 16, 6), "k": (2, 8, 6)}, 50.0)),
    ("seerattention", lambda: AttnGate(4, 2, 8, width=8, map_q=False, rope=False), lambda n: (shapes(n), n.rope), ({"k": (4, 24, 8)}, None)),
    ("seerattention", lambda: SeerAttention(4, 2, 8, width=6, block_size=4, threshold=0.1, ratio=0.5, last_dense=2, base=50.0), lambda n: (n.gate.block_size, n.threshold, n.ratio, n.last_dense, n.rope.base, n.gate.rope.base), (4, 0.1, 0.5, 2, 50.0, 50.0)),
    ("seerattention", lambda: SeerAttention(4, 2, 8, rope=False, k_pools=("avg",), q_pools=("min",)), lambda n: (n.rope, n.gate.rope, n.gate.pools), (None, None, (("min",), ("avg",)))),
    ("sla", lambda: SparseLinearAttention(8, 0.3, 0.2, block_size=4), lambda n: (largest("linear.weight")(n), largest("linear.bias")(n), n.top, n.bottom, n.block_size), (0.0, 0.0, 0.3, 0.2, 4)),
    ("sparse-transformer", lambda: SparseBlock(16, 2, "softmax", dropout=0.25, recompute=True), lambda n: (dropped(n), n.recompute, widths(n.mlp)), ([0.25], True, [(16, 64), (64, 16)])),
    ("sparse-transformer", lambda: position_embedding(10, 4, 8), lambda n: [x.num_embeddings for x in n], [3, 4]),
    ("sparsifiner", lambda: SparsifinerAttention(16, 4, 20, reduction=4, bias=False), lambda n: (plain(n), widths(n), shapes(n), n.scale), (["reduce_q", "reduce_k"], [(16, 48), (16, 16), (4, 1), (4, 1)], {"down": (20, 2), "up": (20, 2)}, 0.5)),
    ("sparsifiner", lambda: SparsifinerAttention(16, 4, 5, scale=0.3, basis_threshold=0.1, coefficient_threshold=0.2), lambda n: (plain(n), len(n.down.T), n.scale, n.sparse, n.gather, n.basis_threshold, n.coefficient_threshold), ([], 1, 0.3, True, False, 0.1, 0.2)),
    ("ssa", lambda: SSAAttention(16, 4, 2, block_size=4, top_k=3), lambda n: (n.mode, n.distance, n.k.out_features, n.head_gate is None, n.rope is None), ("sparse", None, 8, False, False)),
    ("ssa", lambda: SSAAttention(16, 4, rope=False, head_dim=6), lambda n: (n.rope, n.q.out_features), (None, 24)),
    ("superlinear-attention", lambda: SuperlinearAttention(16, 4, 2, backward=1.0, forward=0.5, span_power=0.25), lambda n: (plain(n), n.k.out_features, n.spans, n.rope is None), (["search", "q", "out", "k", "v"], 8, (1.0, 0.5, 0.25), False)),
    ("superlinear-attention", lambda: SuperlinearAttention(16, 4, rope=False), lambda n: (n.rope, n.v.out_features), (None, 16)),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "make", "read", "wanted"), CASES, ids=[case[0] for case in CASES])
def test_options_reach_their_parts(slug: str, make: Callable[[], Any], read: Callable[[Any], Any], wanted: Any) -> None:
    torch.manual_seed(0)
    assert read(make()) == wanted


FIRST: list[tuple[str, Callable[[], nn.Module], str, float]] = [
    ("alternating-sparse-attention", lambda: LocalLatentAttention(16, 4, rank=25, head_dim=20), "up_k", 0.2),
    ("alternating-sparse-attention", lambda: GlobalLatentAttention(16, 4, rank=25, head_dim=20), "up_v", 0.2),
    ("flash-window-attention", lambda: SwinWindowAttention(16, 8), "table", 0.02),
    ("fused-neighborhood", lambda: NeighborhoodAttention2D(16, 8, bias=True), "bias", 0.02),
    ("halonet", lambda: HaloAttention2d(16, heads=2, head_dim=25), "rel_h", 0.2),
    ("halonet", lambda: HaloAttention2d(16, heads=2, head_dim=25), "rel_w", 0.2),
    ("mosa", lambda: MoSA(64, 8, head_dim=12), "router", 64**-0.5 / math.sqrt(3)),
    ("mosa", lambda: MoSA(64, 8, head_dim=12), "qkv", 36**-0.5 / math.sqrt(3)),
    ("mosa", lambda: MoSA(64, 8, head_dim=12), "out", 512**-0.5 / math.sqrt(3)),
    ("seerattention", lambda: AttnGate(4, 2, 10, width=20), "q", 10**-0.5),
    ("seerattention", lambda: AttnGate(4, 2, 10, width=20), "k", 30**-0.5),
    ("sparse-transformer", lambda: SparseBlock(32, 2, "softmax", layers=8), "attention.out.weight", 512**-0.5),
    ("sparse-transformer", lambda: SparseBlock(32, 2, "softmax", layers=8), "mlp.2.weight", 2048**-0.5),
    ("sparse-transformer", lambda: position_embedding(100, 10, 64), "0.weight", 0.125 / 8),
    ("sparse-transformer", lambda: position_embedding(100, 10, 64), "1.weight", 0.125 / 8),
    ("sparsifiner", lambda: SparsifinerAttention(16, 4, 100), "down", 0.1),
    ("sparsifiner", lambda: SparsifinerAttention(16, 4, 100), "up", 0.1),
]


@pytest.mark.parametrize(("slug", "make", "name", "std"), FIRST, ids=[f"{slug}-{name}" for slug, _, name, _ in FIRST])
def test_first_values_have_their_spread(slug: str, make: Callable[[], nn.Module], name: str, std: float) -> None:
    torch.manual_seed(0)
    mean, found = spread(make(), name)
    assert found == pytest.approx(std, rel=0.1) and abs(mean) < 0.2 * std
