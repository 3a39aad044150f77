"""Every option of a vision row's parts reaches the place that it is of, and what has no option is as the papers' code has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inspected import dropped, eps, paths, plain, spread, widths
from layers import vit
from torch import nn

from regard.zoo.vision.a2n import A2N, AttentionInAttention
from regard.zoo.vision.acmil import ACMIL, MultiQueryACMIL
from regard.zoo.vision.activator import ActivatorBlock, ActivatorUnit, ActivatorViT
from regard.zoo.vision.attention_cl import ClipReID, OSMCAALoss, TemporalAttentionPool
from regard.zoo.vision.attmask import IBOTLoss, MaskedDistiller
from regard.zoo.vision.cbam import CBAM
from regard.zoo.vision.comateformer import CompositionalAttention, PairClassifier
from regard.zoo.vision.contmix import ContMix, OverLoCK
from regard.zoo.vision.convit import GPSA, ConViT
from regard.zoo.vision.csa import BoundaryHead, ClassSemanticAttention
from regard.zoo.vision.dcal import DCAL
from regard.zoo.vision.dependencyvit import DependencyViT, ReversedAttention
from regard.zoo.vision.ela import ELA, CoordinateAttention
from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner
from regard.zoo.vision.hyperzzw import SFNEBlock, Terminator
from regard.zoo.vision.ifam import TwoStageFaithful
from regard.zoo.vision.little_attention_block import LiteAttention, NonLocal
from regard.zoo.vision.litv2_hilo import HiLo, LITv2
from regard.zoo.vision.mamba_yolo import SS2D, MambaYOLO, VSSBlock
from regard.zoo.vision.mambaout import GatedCNNBlock, MambaOut
from regard.zoo.vision.moment_probing import PSRP, CrossCovHead, MomentProbe
from regard.zoo.vision.mossformer import JointGatedAttention, MossFormerSeparator
from regard.zoo.vision.ninformer import NiNBlock, NiNformer
from regard.zoo.vision.polarized_attention import PolarizedSelfAttention
from regard.zoo.vision.sentence_attention_block import AnswerGrounder, SentenceAttention
from regard.zoo.vision.set_transformer import MAB, SetTransformer
from regard.zoo.vision.spa import SelectPackAttention, SelectPackBlock, SelectPackNet
from regard.zoo.vision.tcpa import TCPA
from regard.zoo.vision.twins import GlobalSubsampledAttention, LocallyGroupedAttention, Twins, pcpvt
from regard.zoo.vision.ulsam import ULSAM
from regard.zoo.vision.van_lka import LKA, VAN, VANBlock

SMALL_NET = {"dims": (8, 8, 8, 8), "depths": (1,) * 4, "focus": (1, 1), "heads": (1, 1), "kernels": (5,) * 4, "small": 3}
TINY = {"side": 8, "patch": 4, "channels": 2, "classes": 3}
SLOW = {"kernels": (3, 1, 5, 3), "hidden": (4,) * 5, "groups": 2, "omega": 1.0}


def at(path: str) -> Callable[[Any], Any]:
    def read(net: Any) -> Any:
        for part in path.split("."):
            net = net[int(part)] if part.lstrip("-").isdigit() else getattr(net, part)
        return net.tolist() if isinstance(net, torch.Tensor) else net

    return read


Case = tuple[str, Callable[[], Any], Callable[[Any], Any], Any]
CASES: list[Case] = [
    ("a2n", lambda: AttentionInAttention(8, slope=0.3), at("attention.slope"), 0.3),
    ("a2n", lambda: AttentionInAttention(8, kernel=5, plain_kernel=1), lambda n: {m.kernel_size[0] for m in n.attention.children()}, {1, 5}),
    ("a2n", lambda: AttentionInAttention(12, reduction=3), lambda n: widths(n.router), [(12, 4), (4, 2)]),
    (
        "a2n",
        lambda: AttentionInAttention(8),
        plain,
        ["first", "last", "router.0", "router.2", "attention.first", "attention.value", "attention.last", "plain"],
    ),
    ("a2n", lambda: A2N(2, 8, 4, 2, 1, 3, 2, 5.0, 0.4), lambda n: {(b.temperature, b.slope, b.attention.slope) for b in n.blocks}, {(5.0, 0.4, 0.4)}),
    ("a2n", lambda: A2N(2, 8, 4, 2, 1, 3, 2, 5.0, 0.4), lambda n: (n.slope, n.blocks[0].plain.kernel_size, widths(n.blocks[1].router)), (0.4, (1, 1), [(8, 4), (4, 2)])),
    ("acmil", lambda: ACMIL(6, 3, 8, 5, 2, dropout=0.25), dropped, [0.25] * 3),
    ("acmil", lambda: MultiQueryACMIL(6, 3, 8, 2, 2, dropout=0.25, attention_dropout=0.125), dropped, [0.25] * 3 + [0.125] * 3),
    ("acmil", lambda: MultiQueryACMIL(6, 3, 8, 2, 2), eps, {1e-6}),
    ("acmil", lambda: ACMIL(6, 3, 8, 5, 2), plain, ["reduce"]),
    ("activator", lambda: ActivatorBlock(8, 12, eps=0.1), eps, {0.1}),
    ("activator", lambda: ActivatorUnit(8), widths, [(8, 16), (8, 16), (16, 8)]),
    ("activator", lambda: ActivatorViT(8, 12, 2, 0.25, mlp=False), lambda n: [m.mlp for m in n.modules() if isinstance(m, ActivatorBlock)], [None] * 2),
    ("activator", lambda: ActivatorViT(8, 12, 1, 0.25), lambda n: set(dropped(n)), {0.25}),
    ("attention-cl", lambda: TemporalAttentionPool(6, 5, (4, 3), kaiming=False), lambda n: float(n.conv.bias.detach().abs().max()) > 0, True),
    ("attention-cl", lambda: OSMCAALoss(1.0, 0.25, 0.5), lambda n: (n.alpha, n.share, n.sigma), (1.0, 0.25, 0.5)),
    ("attention-cl", lambda: ClipReID(nn.Identity(), 6, 4, None), plain, ["classifier"]),
    ("attmask", lambda: IBOTLoss(4, 5, 2, 0.2, 0.8, (0.5, 2.0)), lambda n: (n.student_temp, n.momentum, n.weights, n.centre.shape, n.patch_centre.shape), (0.2, 0.8, (0.5, 2.0), (1, 4), (1, 1, 5))),
    ("attmask", lambda: MaskedDistiller(vit(), 8, views=3, weights=(1.0, 0.5)), lambda n: (n.loss.views, n.loss.weights), (3, (1.0, 0.5))),
    ("attmask", lambda: MaskedDistiller(vit(), 8), lambda n: widths(n.student["head"]), [(16, 16), (16, 8)]),
    ("attmask", lambda: MaskedDistiller(vit(), 8), lambda n: float(n.mask_token.detach().abs().max()), 0.0),
    ("cbam", lambda: CBAM(8, 4, eps=0.1, momentum=0.2), lambda n: (n.over_pixels.norm.eps, n.over_pixels.norm.momentum), (0.1, 0.2)),
    ("cbam", lambda: CBAM(8, 4, norm=False, kernel=3), lambda n: (eps(n), n.over_pixels.conv.kernel_size), (set(), (3, 3))),
    ("comateformer", lambda: CompositionalAttention(8, 2, bias=False), plain, ["q", "k", "v", "out"]),
    ("comateformer", lambda: CompositionalAttention(8, 2, own=True), widths, [(8, 16), (8, 16), (8, 8), (8, 8)]),
    ("comateformer", lambda: PairClassifier(7, 9, 8, 2, 3, 5), lambda n: (len(n.norms), len(n.attentions), widths(n.mlps[2]), widths(n.head)), (6, 3, [(8, 32), (32, 8)], [(8, 5)])),
    ("contmix", lambda: ContMix(8, 4, eps=0.1), lambda n: eps(n.norm1) | eps(n.norm2), {0.1}),
    ("contmix", lambda: ContMix(8, 4, std=0.5), lambda n: 0.3 < float(n.windows.far.std()) < 0.7, True),
    ("contmix", lambda: ContMix(8, 4, kernel=5, small=3), lambda n: [x for x in plain(n) if x[:3] in ("out", "gat", "fus", "las", "mlp")], ["out.0", "gate.0"]),
    ("contmix", lambda: OverLoCK(**SMALL_NET, eps=0.1), eps, {0.1, 1e-5}),
    ("contmix", lambda: OverLoCK(**SMALL_NET, focus_ratios=(2, 5)), lambda n: [[b.mlp[0].out_channels for b in blocks] for blocks in n.focus], [[16], [40]]),
    ("convit", lambda: GPSA(8, 4, gate=0.5), at("gate"), [0.5] * 4),
    ("convit", lambda: GPSA(8, 4, qkv_bias=True), plain, []),
    ("convit", lambda: GPSA(8, 4), plain, ["qk", "v"]),
    ("convit", lambda: GPSA(8, 4, proj_dropout=0.25), dropped, [0.25]),
    ("convit", lambda: GPSA(4, 4, locality=3.0), at("position.weight"), [[-3, -3, -3], [-3, 3, -3], [3, -3, -3], [3, 3, -3]]),
    ("convit", lambda: GPSA(9, 9), at("position.weight"), [[2 * x, 2 * y, -1] for x in (-1, 0, 1) for y in (-1, 0, 1)]),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, eps=0.1), eps, {0.1}),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, dropout=0.25), lambda n: set(dropped(n)) - {0.0}, {0.25}),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, drop_path=0.5), paths, [0, 0.25, 0.5]),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, ratio=2.0), lambda n: widths(n.blocks[2].mlp), [(8, 16), (16, 8)]),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, locality=2.0), lambda n: [float(b.attention.position.weight[0, 2].detach()) for b in n.blocks[:2]], [-2.0] * 2),
    ("convit", lambda: ConViT(4, 2, 3, 2, **TINY, positions=False), at("places"), None),
    ("csa", lambda: ClassSemanticAttention(3, 8, 2, 5), lambda n: (widths(n.channels), n.local.kernel_size, n.time[0].kernel_size), ([(3, 4), (4, 8)], (5,), (5,))),
    ("csa", lambda: BoundaryHead(8, 4, 9), lambda n: (n.durations, widths(n.proposals)), (9, [(4, 4), (4, 1)])),
    ("dcal", lambda: DCAL(vit(classes=0), 3), at("balance"), [0.0] * 3),
    ("dependencyvit", lambda: ReversedAttention(8, 2, bias=True, qkv_bias=True), plain, []),
    ("dependencyvit", lambda: ReversedAttention(8, 2), plain, ["select", "control.0", "control.2", "qkv"]),
    ("dependencyvit", lambda: ReversedAttention(8, 2, dropout=0.25, proj_dropout=0.5), lambda n: (n.drop.p, n.out_drop.p), (0.25, 0.5)),
    ("dependencyvit", lambda: DependencyViT(8, 2, 2, **TINY, eps=0.1), eps, {0.1}),
    ("dependencyvit", lambda: DependencyViT(8, 2, 2, **TINY, dropout=0.25), lambda n: [b.attention.out_drop.p for b in n.blocks] + [b.attention.drop.p for b in n.blocks], [0.25, 0.25, 0, 0]),
    ("dependencyvit", lambda: DependencyViT(8, 3, 2, **TINY, drop_path=0.5), paths, [0, 0.25, 0.5]),
    ("dependencyvit", lambda: DependencyViT(8, 2, 2, **TINY, temperature=0.5, ratio=2.0), lambda n: ({b.attention.temperature for b in n.blocks}, widths(n.blocks[0].mlp)), ({0.5}, [(8, 16), (16, 8)])),
    ("dependencyvit", lambda: DependencyViT(8, 5, 2, (2, 4), 0.2, **TINY), lambda n: [round(b.keep, 6) for b in n.blocks], [1, 0.8, 1, 0.75, 1]),
    ("dependencyvit", lambda: DependencyViT(8, 2, 2, (1,), rank="send", **TINY), lambda n: {b.rank for b in n.blocks}, {"send"}),
    ("ela", lambda: ELA(32, eps=0.1), eps, {0.1}),
    ("ela", lambda: ELA(32, kernel=3, group=4, norm_groups=2), lambda n: (n.conv.kernel_size, n.conv.groups, n.norm.num_groups, n.conv.bias), ((3,), 8, 2, None)),
    ("ela", lambda: CoordinateAttention(64, 4, 2), lambda n: n.rows.in_channels, 16),
    ("ela", lambda: CoordinateAttention(8, 4, 6), lambda n: n.columns.in_channels, 6),
    ("gated-prompt-tuning", lambda: GatedPromptTuner(vit(), 3, gate_init=2.0, span=(0.5, 1.5), dropout=0.25), lambda n: (n.gates.tolist(), n.span, n.drop.p), ([-2.0], (0.5, 1.5), 0.25)),
    ("gated-prompt-tuning", lambda: GatedPromptTuner(vit(), 3, kind="shallow"), at("gates"), None),
    ("gated-prompt-tuning", lambda: GatedPromptTuner(vit(), 3, kind="deep", temperature=False), lambda n: (n.gates, n.temperatures, n.prompts.shape), (None, None, (2, 3, 16))),
    ("hyperzzw", lambda: SFNEBlock(4, 5, **SLOW, dropout=0.25), dropped, [0.25]),
    ("hyperzzw", lambda: Terminator(2, 4, 3, (1,) * 5, (1,) * 5, (0.1, 0.2, 0.3, 0.4, 0.5), **SLOW), dropped, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ("hyperzzw", lambda: Terminator(2, 4, 3, (1, 2, 1, 1, 1), (1,) * 5, **SLOW), lambda n: (n.biases.tolist(), widths(n)[-1], [b.channels for b in n.blocks], n.blocks[0].after.tolist(), n.blocks[0].locals[0].bias.tolist()), ([0.0] * 5, (4, 3), [2, 2, 4, 4, 4], [0.0], [0.0])),
    ("ifam", lambda: TwoStageFaithful(vit(classes=0), vit(classes=0), 5, 3, soft=True, frozen=True), lambda n: (n.soft, n.first.training, n.discovery.training, n.second.training, n.head.bias, n.discovery.parts), (True, False, False, True, None, 3)),
    ("ifam", lambda: TwoStageFaithful(vit(classes=0), vit(classes=0), 5, 3, frozen=True), lambda n: {p.requires_grad for part in (n.first, n.discovery) for p in part.parameters()}, {False}),
    ("litv2-hilo", lambda: HiLo(8, 4, qkv_bias=True), plain, []),
    ("litv2-hilo", lambda: HiLo(8, 4), plain, ["high.q", "high.kv", "low.q", "low.kv"]),
    ("litv2-hilo", lambda: HiLo(8, 4, scale=0.3), lambda n: (n.high.scale, n.low.scale), (0.3, 0.3)),
    ("litv2-hilo", lambda: LITv2(8, (1, 2), (2, 2), (0, 2), 0.5, channels=2, classes=3, drop_path=0.5), paths, [0, 0.25, 0.5]),
    ("litv2-hilo", lambda: LITv2(8, (1, 1), (2, 2), (0, 2), channels=2, classes=3, dropout=0.25), lambda n: [dropped(b.mlp) for b in n.layers if hasattr(b, "mlp")], [[0.25] * 2] * 2),
    ("little-attention-block", lambda: LiteAttention(16, 4, 5), lambda n: (widths(n.over_channels), n.over_pixels[1].kernel_size), ([(16, 4), (4, 16)], (5, 5))),
    ("little-attention-block", lambda: NonLocal(8), lambda n: n.theta.out_channels, 4),
    ("mamba-yolo", lambda: SS2D(8, bias=True, dropout=0.25), lambda n: (plain(n), dropped(n)), ([], [0.25])),
    ("mamba-yolo", lambda: SS2D(8, conv_bias=False), plain, ["first", "last", "conv"]),
    ("mamba-yolo", lambda: SS2D(8, rank_ratio=1.0, rank=3), lambda n: (plain(n), n.scan.step.shape), (["first", "last", "down", "up"], (4, 8, 3))),
    ("mamba-yolo", lambda: SS2D(8, rank_ratio=0.0, kernel=1), lambda n: (n.scan.step.shape[1], type(n.conv), type(n.down)), (16, nn.Identity, nn.Identity)),
    ("mamba-yolo", lambda: VSSBlock(4, 8, 2, 3.0, 0.25, state=2), lambda n: (paths(n), len(n.scans), n.mlp.last.in_channels, eps(n.norm1), eps(n.norm2), n.first[0].bias is None), ([0.25], 2, 16, {1e-6}, {1e-6}, False)),
    ("mamba-yolo", lambda: VSSBlock(4, 8, neck=True, ratio=0.0, state=2), lambda n: (n.first[0].bias, n.mlp, n.norm2), (None, None, None)),
    ("mamba-yolo", lambda: VSSBlock(8, 8, neck=True, state=2), lambda n: type(n.first), nn.Identity),
    ("mamba-yolo", lambda: MambaYOLO(2, (8,) * 4, (1,) * 4, state=2, eps=0.1, momentum=0.2), lambda n: {(m.eps, m.momentum) for m in n.modules() if isinstance(m, nn.BatchNorm2d)}, {(0.1, 0.2)}),
    ("mambaout", lambda: GatedCNNBlock(8, 2.0, 5, 0.5, eps=0.1), lambda n: (n.parts, n.conv.kernel_size, n.conv.groups, n.norm.eps, n.scan), ([16, 12, 4], (5, 5), 4, 0.1, None)),
    ("mambaout", lambda: MambaOut((8, 12), (1, 2), 2, 3, 2.0, 0.25, 0.5, 0.1), lambda n: (eps(n), dropped(n), paths(n), widths(n.head)), ({0.1}, [0.25], [0, 0.25, 0.5], [(12, 24), (24, 3)])),
    ("moment-probing", lambda: CrossCovHead(8, 32, 4, eps=0.1), lambda n: (eps(n), plain(n)), ({0.1}, ["convs.0", "convs.2"])),
    ("moment-probing", lambda: MomentProbe(8, 3, 32, mean_norm=True), lambda n: n.norm.eps, 1e-6),
    ("moment-probing", lambda: CrossCovHead(8, 32, 4, "half"), at("pairs"), [(0, 2), (1, 3)]),
    ("moment-probing", lambda: CrossCovHead(8, 32, 4, "all"), lambda n: (n.pairs, n.normed), ([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], False)),
    ("moment-probing", lambda: PSRP(8, 3), lambda n: (plain(n), widths(n)), (["down", "scale", "shift"], [(8, 3), (3, 8), (3, 8)])),
    ("mossformer", lambda: JointGatedAttention(8, 4, 4, norm="layernorm", dropout=0.25, kernel=3), lambda n: (dropped(n), n.dropout, n.hidden.ends, len(eps(n))), ([0.25] * 3, 0.25, (1, 1), 1)),
    ("mossformer", lambda: JointGatedAttention(8, 4, 4, causal=True, kernel=5, rotary=0), lambda n: (n.out.ends, n.turn), ((4, 0), None)),
    ("mossformer", lambda: MossFormerSeparator(3, 8, 6, 1, 4, 0.1, group=4, qk_dim=4), lambda n: (n.norm1.eps, n.norm2.eps, n.blocks[-1].eps, n.encoder.stride, n.decoder.stride, n.split.out_channels), (0.1, 0.1, 1e-6, (2,), (2,), 18)),
    ("mossformer", lambda: MossFormerSeparator(2, 8, 6, 1, group=4, qk_dim=4), lambda n: [x for x in plain(n) if "block" not in x], ["encoder", "first", "last", "decoder"]),
    ("ninformer", lambda: NiNBlock(8, 4, 12, 0.25, eps=0.1), lambda n: (eps(n), set(dropped(n)), n.second), ({0.1}, {0.25}, None)),
    ("ninformer", lambda: NiNBlock(8, 4, 12, shared_norm=False, eps=0.1), lambda n: n.second.eps, 0.1),
    ("ninformer", lambda: NiNformer(8, 12, 1, 0.25, side=16, patch=4), lambda n: [b.unit.tokens for b in n.modules() if isinstance(b, NiNBlock)], [16]),
    ("polarized-attention", lambda: PolarizedSelfAttention(8), lambda n: sorted(plain(n)), ["q_channel", "q_plane", "up", "v_channel", "v_plane"]),
    ("polarized-attention", lambda: PolarizedSelfAttention(32, "sequential", True, inner=2), lambda n: widths(n.up), [(16, 8), (8, 32)]),
    ("sentence-attention-block", lambda: SentenceAttention(4, 6, ratio=3, eps=0.1), lambda n: (widths(n), eps(n)), ([(4, 12), (12, 6)], {0.1})),
    ("sentence-attention-block", lambda: AnswerGrounder([nn.Identity()], (2,), 5, 4, 0.25, colours=2, image_norm=False), lambda n: (dropped(n), type(n.image_norm), n.head.out_channels), ([0.25], nn.Identity, 4)),
    ("sentence-attention-block", lambda: AnswerGrounder([nn.Identity()] * 2, (2, 2), 5, norm="sigmoid"), lambda n: ({a.kind for a in n.attentions}, plain(n.merges), n.image_norm.num_features), ({"sigmoid"}, ["0.0"], 3)),
    ("set-transformer", lambda: MAB(6, 6, 8, 2), lambda n: n.scale, 8**-0.5),
    ("set-transformer", lambda: MAB(6, 6, 8, 2, paper_scale=True), lambda n: n.scale, 4**-0.5),
    ("set-transformer", lambda: SetTransformer(6, 3, 8, 2, 4, norm=True), lambda n: len([m for m in n.modules() if isinstance(m, nn.LayerNorm)]), 2 * 6),
    ("spa", lambda: SelectPackAttention(8, 2, qkv_bias=False), plain, ["qkv"]),
    ("spa", lambda: SelectPackBlock(8, 2, 5, 2.0, 0.25), lambda n: (n.attention.length, n.attention.gate.noise, widths(n.mlp)), (5, 0.25, [(8, 16), (16, 8)])),
    ("spa", lambda: SelectPackNet((8, 16), (1, 2), (2, 2), length=7, noise=0.5, patch=2), lambda n: ({(b.attention.length, b.attention.gate.noise) for stage in n.stages for b in stage}, [p.kernel_size for p in n.patches]), ({(7, 0.5)}, [(2, 2), (2, 2)])),
    ("tcpa", lambda: TCPA(vit(), 3, dropout=0.25), lambda n: (n.drop.p, n.random_choice, n.own.prompts.shape, n.shared.keys.shape), (0.25, False, (2, 20, 4, 16), (2, 20, 16))),
    ("twins", lambda: LocallyGroupedAttention(8, 2, 3, True, 0.25, 0.5), lambda n: (plain(n), n.inner.dropout, dropped(n)), ([], 0.25, [0.5])),
    ("twins", lambda: GlobalSubsampledAttention(8, 2, 2, True, 0.25, 0.5, 0.1), lambda n: (plain(n), n.inner.dropout, dropped(n), n.norm.eps), ([], 0.25, [0.5], 0.1)),
    ("twins", lambda: GlobalSubsampledAttention(8, 2, 1), lambda n: (n.reduce, n.norm), (None, None)),
    ("twins", lambda: pcpvt(dims=(8, 8), depths=(1, 1), heads=(2, 2), ratios=(2, 2), reductions=(2, 1)), lambda n: [type(b.attention) for stage in n.stages for b in stage], [GlobalSubsampledAttention] * 2),
    ("ulsam", lambda: ULSAM(8, 2, eps=0.1, momentum=0.2), lambda n: ({part[0].eps for part in n.after}, {part[0].momentum for part in n.after}), ({0.1}, {0.2})),
    ("ulsam", lambda: ULSAM(8, 2, bare=True), plain, ["depthwise", "pointwise"]),
    ("van-lka", lambda: LKA(4, 35, 5), lambda n: (n.near.kernel_size, n.near.padding, n.far.weight.shape), ((9, 9), (4, 4), (4, 1, 7, 7))),
    ("van-lka", lambda: VANBlock(4, 3.0, dropout=0.25, drop_path=0.5), lambda n: (set(dropped(n)), paths(n)), ({0.25}, [0.5])),
    ("van-lka", lambda: VAN((8, 8), (1, 2), (2, 2), 2, 3, 9, 2, 0.5, 0.25, 0.5, 0.1), lambda n: (paths(n), set(dropped(n)), eps(n), n.stages[0][2].scale1.tolist()), ([0, 0.25, 0.5], {0.25}, {0.1, 1e-5}, [0.5] * 8)),
    ("van-lka", lambda: VAN((8, 8), (1, 1), (2, 2), 2, 3, 9, 2), lambda n: [(s[0].kernel_size[0], s[0].stride[0], s[0].padding[0]) for s in n.stages], [(7, 4, 3), (3, 2, 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "make", "read", "wanted"), CASES, ids=[case[0] for case in CASES])
def test_options_reach_their_parts(slug: str, make: Callable[[], Any], read: Callable[[Any], Any], wanted: Any) -> None:
    torch.manual_seed(0)
    assert read(make()) == wanted


@pytest.mark.parametrize(
    ("slug", "make", "name", "std"),
    [
        ("acmil", lambda: MultiQueryACMIL(6, 3, 64, 2, 4), "queries", 1e-6),
        ("convit", lambda: GPSA(64, 4), "qk.weight", 0.02),
        ("convit", lambda: GPSA(60, 5), "out.weight", 0.02),
        ("convit", lambda: ConViT(4, 16, 3, 2, side=64, patch=4, channels=2, classes=30), "places", 0.02),
        ("convit", lambda: ConViT(4, 16, 3, 2, side=8, patch=4, channels=2, classes=30), "head.weight", 0.02),
        ("convit", lambda: ConViT(4, 16, 3, 2, side=8, patch=4, channels=2, classes=30), "blocks.2.attention.out.weight", 0.02),
        ("dependencyvit", lambda: DependencyViT(64, 2, 2, side=64, patch=4, channels=2, classes=30), "places", 0.02),
        ("dependencyvit", lambda: DependencyViT(64, 2, 2, side=8, patch=4, channels=2, classes=30), "head.weight", 0.02),
        ("dependencyvit", lambda: DependencyViT(64, 2, 2, side=8, patch=4, channels=2, classes=30), "blocks.0.attention.qkv.weight", 0.02),
        ("hyperzzw", lambda: Terminator(3, 4, 200, (1,) * 5, (1,) * 5, (0.0,) * 5, **{**SLOW, "groups": 3}), "head.weight", (2 / 3) ** 0.5),
        ("ifam", lambda: TwoStageFaithful(vit(classes=0), vit(classes=0), 100, 3), "head.weight", 0.02),
        ("litv2-hilo", lambda: LITv2(32, (1, 1), (2, 2), (0, 2), channels=2, classes=30), "head.weight", 0.02),
        ("litv2-hilo", lambda: LITv2(32, (1, 1), (2, 2), (0, 2), channels=2, classes=30), "layers.2.mlp.0.weight", 0.02),
        ("litv2-hilo", lambda: LITv2(32, (1, 1), (2, 2), (0, 2), channels=2, classes=30), "layers.2.mlp.1.weight", math.sqrt(2 / 9)),
        ("litv2-hilo", lambda: LITv2(32, (1, 1), (2, 2), (0, 2), channels=2, classes=30), "layers.4.attention.low.kv.weight", 0.02),
        ("mambaout", lambda: MambaOut((32, 32), (1, 1), classes=30), "layers.1.first.weight", 0.02),
        ("mossformer", lambda: JointGatedAttention(64), "gamma", 0.02),
        ("set-transformer", lambda: SetTransformer(6, 3, 64, 2, 60), "encoder.0.points", math.sqrt(2 / (60 * 64 + 64))),
        ("twins", lambda: Twins((32,), (2,), (2,), (3,), (2,), (2,), classes=30), "head.weight", 0.02),
        ("van-lka", lambda: VAN((32,), (1,), (2,), classes=30), "head.weight", 0.02),
        ("van-lka", lambda: VANBlock(32, 4.0), "attention.first.weight", math.sqrt(2 / 32)),
    ],
)  # fmt: skip
def test_first_values_have_their_spread(slug: str, make: Callable[[], nn.Module], name: str, std: float) -> None:
    torch.manual_seed(0)
    mean, found = spread(make(), name)
    assert found == pytest.approx(std, rel=0.1) and abs(mean) < 0.2 * std
