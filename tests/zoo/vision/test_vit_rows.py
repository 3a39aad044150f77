"""Prompts, probes, pools and diluted layers on vision transformers of timm: refusals, frozen parts and edges."""

import math

import pytest
import torch
from layers import vit
from torch import nn

from regard import RegardError
from regard.nn.images import timm_host
from regard.nn.images.register_tokens import sign_max
from regard.nn.images.vit_host import attention, closed, embedded, heads_of, host_of, weights_of
from regard.zoo.vision.attmask import MaskedDistiller
from regard.zoo.vision.dcal import DCAL, chosen, rollout
from regard.zoo.vision.gated_prompt_tuning import GatedPromptTuner
from regard.zoo.vision.ifam import TwoStageFaithful
from regard.zoo.vision.lambda_vit import DilutedBlock, dilute, entropy_without, layer_entropy, select_layers, transfer_entropy
from regard.zoo.vision.moment_probing import PSRP, CrossCovHead, MomentProbe, MomentProbedViT
from regard.zoo.vision.tcpa import TCPA, PromptPool
from regard.zoo.vision.test_time_registers import TestTimeRegisters, find_register_neurons, outlier_metrics
from regard.zoo.vision.token_pooling import PooledViT, token_pool

X = torch.randn(2, 3, 8, 8)
POOLS = {"size": 4, "length": 1, "top": 2}


def made(**options):
    timm = timm_host.load("timm")
    torch.manual_seed(0)
    usual = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 3}
    return timm.models.vision_transformer.VisionTransformer(**{**usual, **options}).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "init_values": 0.1}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"pre_norm": True}],
)
def test_a_host_part_by_part_is_the_host(options):
    model = made(**options)
    x = embedded(model, X)
    for block in model.blocks:
        y = block.norm1(x)
        v = heads_of(block.attn, y)[2]
        assert torch.allclose(attention(block.attn, y), block.attn(y), atol=1e-5)
        assert torch.allclose(closed(block.attn, weights_of(block.attn, y) @ v, y), block.attn(y), atol=1e-5)
        x = block(x)
    assert torch.allclose(model.norm(x), model.forward_features(X), atol=1e-5)


def test_masked_patches_are_the_token():
    model, token = made(), torch.randn(16)
    masked = torch.tensor([[True, False, False, True], [False] * 4])
    x, plain = embedded(model, X, masked, token), embedded(model, X)
    assert torch.equal(x[1], plain[1]) and torch.equal(x[0, 2:4], plain[0, 2:4])
    assert torch.allclose(x[0, 1], token + model.pos_embed[0, 1], atol=1e-6)


def test_only_what_gated_prompt_tuning_tcpa_and_moment_probing_add_learns():
    for net in (GatedPromptTuner(vit(), 3, 3), TCPA(vit(), 3, POOLS, POOLS), MomentProbedViT(vit(), 3, rank=2, proj=32)):
        out = net.train()(X)
        (out[0].sum() + out[1] if isinstance(out, tuple) else out.sum()).backward()
        assert not net.vit.training and net.training
        host = [name for name, p in net.named_parameters() if name.startswith("vit.") and "psrp" not in name and p.grad is not None]
        assert host == []
        assert all(p.grad is not None for name, p in net.named_parameters() if not name.startswith("vit.") or "psrp" in name), type(net)


def test_first_values_of_gated_prompt_tuning_and_tcpa():
    net = GatedPromptTuner(vit(), 50)
    edge = (6 / (3 * 16 + 16)) ** 0.5
    assert 0.9 * edge < float(net.prompts.detach().abs().max()) <= edge and float(net.gates.detach().max()) == -10
    assert net(X).shape == (2, 16) and net.gates.shape == (1,) and net.temperatures.shape == (2,)
    pool = PromptPool(2, 16)
    assert float(pool.keys.detach().abs().max()) <= 1 and pool.prompts.shape == (2, 20, 4, 16) and pool.top == 3


def test_chance_of_gated_prompt_tuning_and_tcpa_stands_in_training_alone():
    torch.manual_seed(0)
    for net in (GatedPromptTuner(vit(), 3, 3, dropout=0.5), TCPA(vit(), 3, POOLS, POOLS, dropout=0.5)):
        first = net.train()(X), net(X)
        assert not torch.equal(*(y[0] if isinstance(y, tuple) else y for y in first))
        last = net.eval()(X), net(X)
        assert torch.equal(*(y[0] if isinstance(y, tuple) else y for y in last))
    net = TCPA(vit(), 3, POOLS, POOLS, dropout=0.0).train()
    plain = net(X)[1]
    net.random_choice = True
    assert float(net(X)[1]) > float(plain) and torch.equal(net.eval()(X)[1], plain)


def test_tcpa_of_a_changed_token_changes_its_own_row_alone():
    net = TCPA(vit(), 3, POOLS, POOLS)
    x = torch.randn(1, 5, 16)
    y = x.clone()
    y[0, 3] = net.shared.keys[0, net.visible(x, 0)[0][0, 3, 5:9].logical_not().nonzero()[0, 0]].detach()
    a, b = net.visible(x, 0)[0], net.visible(y, 0)[0]
    assert torch.equal(a[0, [0, 1, 2, 4]], b[0, [0, 1, 2, 4]]) and not torch.equal(a[0, 3], b[0, 3])


def test_moment_probing_with_psrp_of_zeros_leaves_the_host_bit_for_bit():
    model = vit().eval()
    before = model.forward_features(X)
    net = MomentProbedViT(model, 3, rank=2, proj=32)
    for part in net.modules():
        if isinstance(part, PSRP):
            nn.init.zeros_(part.scale.weight)
            nn.init.zeros_(part.shift.weight)
    assert torch.allclose(net.vit.forward_features(X), before, atol=1e-6)
    assert sum(p.numel() for p in PSRP(16, 2).parameters()) == 3 * 32


def test_moment_probing_of_hosts_without_a_class_token():
    net = MomentProbedViT(made(class_token=False, global_pool="avg"), 3, proj=32)
    assert net(X).shape == (2, 3)


def test_lambda_vit_selection_leaves_the_model_alone():
    model = vit()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(select_layers(model, X, 2)) == 2 and transfer_entropy(model, X, [0]) >= 0
    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(block, DilutedBlock) for block in model.blocks)


def test_token_pooling_of_everything_and_of_one():
    x, w = torch.randn(2, 7, 4), torch.rand(2, 7)
    for method in ("kmeans", "kmedoids", "topk", "random", "grid"):
        whole = token_pool(x, 7, w, method)
        assert torch.equal(whole.tokens, x) and torch.equal(whole.assign, torch.arange(7).expand(2, -1))
        one = token_pool(x, 1, w, method)
        assert one.tokens.shape == (2, 1, 4) and one.assign.max() == 0
    assert torch.allclose(token_pool(x, 1, w).tokens[:, 0], (w[..., None] * x).sum(1) / w.sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(token_pool(x, 2, method="grid").tokens[:, 1], x[:, 4:].mean(1), atol=1e-6)
    top = token_pool(x, 3, w, "topk")
    assert torch.equal(top.centres, w.topk(3, 1).indices) and torch.equal(top.tokens, x.gather(1, top.centres[..., None].expand(-1, -1, 4)))
    heavy = torch.zeros(2, 7)
    heavy[:, [1, 4]] = 1.0
    assert set(token_pool(x, 2, heavy, "random").centres.flatten().tolist()) == {1, 4}
    draw = torch.rand(2, 7)
    assert torch.equal(token_pool(x, 3, method="random", draw=draw).centres, draw.topk(3, 1).indices)
    same = token_pool(x[:, :1].expand(-1, 7, -1), 3, w)  # equal tokens: empty clusters keep their centres
    assert same.tokens.isfinite().all()
    assert token_pool(x.half(), 3, w).tokens.dtype == torch.float16


def test_token_pooling_without_a_pool_is_the_model_and_passes_gradients():
    model = vit().eval()
    assert torch.allclose(PooledViT(model, {})(X), model(X), atol=1e-6)
    x = X.clone().requires_grad_()
    PooledViT(model, {0: 2, 1: 50})(x).sum().backward()
    assert x.grad.isfinite().all() and float(x.grad.abs().max()) > 0


def test_dcal_pairs_are_drawn_in_training_alone_and_never_with_oneself():
    torch.manual_seed(0)
    net, same = DCAL(vit(classes=0), 3, 0.5), X[:1].expand(4, -1, -1, -1)
    out = net.train()(same)
    assert torch.allclose(out.pair, out.whole, atol=1e-5)
    assert net(X[:1]).pair is None and net.eval()(X).pair is None
    first = net.train()(X, torch.tensor([1, 0]))
    assert torch.equal(first.pair, net(X).pair)  # of two images, each other
    net.loss(first, torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.allclose(first.probabilities.sum(1), torch.full((2,), 2.0))


def test_dcal_patches_follow_the_rollout():
    rolled = torch.rand(2, 5, 5)
    assert chosen(rolled, 0.01).shape == (2, 2) and chosen(rolled, 1.0).shape == (2, 5)
    assert torch.equal(chosen(rolled, 0.5)[:, 1:], rolled[:, 0, 1:].topk(2, 1).indices + 1)


def test_test_time_registers_leave_no_hooks_after_a_call_or_an_error():
    net = TestTimeRegisters(vit(), {0: [1]})
    with pytest.raises(RegardError):
        net(torch.randn(1, 3, 12, 12))
    net(X)
    assert not any(module._forward_hooks for module in net.vit.modules())
    x = torch.tensor([[[1.0], [-3.0], [2.0]]])
    assert float(sign_max(x)) == -3 and float(sign_max(-x)) == 3
    assert set(outlier_metrics(net, X)) == {"norms", "share"}


def test_test_time_registers_units_are_ranked_over_images_with_outliers():
    model = vit()
    found = find_register_neurons(model, X, 0.0, top=5, last=0)
    assert list(found) == [0] and len(found[0]) == 5 and len(set(found[0])) == 5
    seen = find_register_neurons(model, X, 0.0, top=64, quiet=(-1e9, 0.5))
    assert sum(map(len, seen.values())) == 64
    with pytest.raises(RegardError, match="above threshold"):
        find_register_neurons(model, X, 1e9)


NO_HOST = {
    "attmask": lambda net: MaskedDistiller(net, 8),
    "dcal": lambda net: DCAL(net, 3),
    "gated-prompt-tuning": lambda net: GatedPromptTuner(net, 3),
    "ifam, first": lambda net: TwoStageFaithful(net, vit(classes=0)),
    "ifam, second": lambda net: TwoStageFaithful(vit(classes=0), net),
    "lambda-vit, dilute": lambda net: dilute(net, [0]),
    "lambda-vit, select": lambda net: select_layers(net, X, 1),
    "lambda-vit, entropy": lambda net: entropy_without(net, X, ()),
    "moment-probing": lambda net: MomentProbedViT(net, 3),
    "tcpa": lambda net: TCPA(net, 3),
    "test-time-registers": lambda net: TestTimeRegisters(net, {}),
    "test-time-registers, units": lambda net: find_register_neurons(net, X, 0.0),
    "test-time-registers, metrics": lambda net: outlier_metrics(net, X),
    "token-pooling": lambda net: PooledViT(net, {}),
}


@pytest.mark.parametrize("name", NO_HOST)
def test_what_is_no_vision_transformer_is_refused(name):
    for net in (nn.Linear(3, 3), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))):
        with pytest.raises(RegardError, match="expected"):
            NO_HOST[name](net)


def test_lambda_vit_of_hosts_with_layer_scales_and_dropped_paths():
    model = made(init_values=0.3)
    before = model(X)
    diluted = dilute(model, [0, 1])
    assert torch.allclose(model(X), before, atol=1e-5)
    diluted.lam = 0.0
    x = embedded(model, X)
    for part in model.blocks:
        block = part.block
        x = 2 * x
        x = x + block.ls2(block.mlp(block.norm2(x)))
    closed = model.forward_head(model.norm(x))
    assert torch.allclose(model(X), closed, atol=1e-4) and torch.allclose(diluted.strip()(X), closed, atol=1e-4)
    torch.manual_seed(0)
    for lam in (0.5, 0.0):
        model = made(drop_path_rate=0.5)
        dropping = dilute(model, [1])
        dropping.lam = lam
        assert torch.equal(model(X), model(X))
        seen = [model.train()(X) for _ in range(16)]
        assert any(not torch.equal(seen[0], other) for other in seen)
        if lam == 0:
            stripped = dropping.strip()
            seen = [stripped.train()(X) for _ in range(16)]
            assert any(not torch.equal(seen[0], other) for other in seen)


def test_moment_probing_of_hosts_with_layer_scales():
    model = made(init_values=0.3)
    before = model.forward_features(X)
    net = MomentProbedViT(model, 3, rank=2, proj=32)
    for part in net.modules():
        if isinstance(part, PSRP):
            nn.init.zeros_(part.scale.weight)
            nn.init.zeros_(part.shift.weight)
    assert torch.allclose(net.vit.forward_features(X), before, atol=1e-6)


def test_test_time_registers_units_of_first_tokens_count_where_asked_for():
    model = vit()
    with torch.no_grad():
        model.cls_token.fill_(1000.0)
    with pytest.raises(RegardError, match="above threshold"):
        find_register_neurons(model, X, 500.0, top=3)
    found = find_register_neurons(model, X, 500.0, top=3, first_tokens=True)
    assert sum(map(len, found.values())) == 3


def test_lambda_vit_entropy_of_constants_and_in_batches():
    assert float(layer_entropy(torch.ones(2, 3, 4), 0.5)) == pytest.approx(4 * math.log(0.5))
    x = torch.tensor([[0.0, 0.0], [2.0, 6.0]])
    assert float(layer_entropy(x)) == pytest.approx(math.log(1) + math.log(3))
    model, images = vit().eval(), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        truth = float(layer_entropy(model.forward_features(images)))
    for batch in (1, 2, 64):
        assert entropy_without(model, images, (), batch) == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: host_of(nn.Linear(2, 2)),
        lambda: embedded(vit(), torch.randn(1, 3, 12, 8)),
        pytest.param(lambda: GatedPromptTuner(vit(), 3, kind="vpt"), id="gated-prompt-tuning"),
        pytest.param(lambda: GatedPromptTuner(vit(), 3, kind="deep"), id="gated-prompt-tuning"),
        pytest.param(lambda: GatedPromptTuner(vit(), 0), id="gated-prompt-tuning"),
        pytest.param(lambda: GatedPromptTuner(vit(), 3, pool="mean"), id="gated-prompt-tuning"),
        pytest.param(lambda: GatedPromptTuner(made(class_token=False, global_pool="avg"), 3, pool="class"), id="gated-prompt-tuning"),
        pytest.param(lambda: TCPA(vit(), 3, mask="soft"), id="tcpa"),
        pytest.param(lambda: TCPA(made(reg_tokens=1), 3), id="tcpa"),
        pytest.param(lambda: PromptPool(2, 8, size=3, top=4), id="tcpa"),
        pytest.param(lambda: CrossCovHead(8, 10, 4), id="moment-probing"),
        pytest.param(lambda: CrossCovHead(8, 24, 3, "half"), id="moment-probing"),
        pytest.param(lambda: CrossCovHead(8, 24, 4), id="moment-probing"),
        pytest.param(lambda: CrossCovHead(8, 32, 4, "one"), id="moment-probing"),
        pytest.param(lambda: MomentProbe(8, 3, 32)(torch.randn(2, 0, 8)), id="moment-probing"),
        pytest.param(lambda: MomentProbe(8, 3, 32)(torch.randn(2, 4, 8), torch.randn(2, 6)), id="moment-probing"),
        pytest.param(lambda: dilute(vit(), []), id="lambda-vit"),
        pytest.param(lambda: dilute(vit(), [0, 0]), id="lambda-vit"),
        pytest.param(lambda: dilute(vit(), [5]), id="lambda-vit"),
        pytest.param(lambda: dilute(vit(), [0]).strip(), id="lambda-vit"),
        pytest.param(lambda: dilute(dilute(vit(), [0]).vit, [0]), id="lambda-vit"),
        pytest.param(lambda: setattr(dilute(vit(), [0]), "lam", 2.0), id="lambda-vit"),
        pytest.param(lambda: layer_entropy(torch.randn(1, 4)), id="lambda-vit"),
        pytest.param(lambda: select_layers(vit(), X, 3), id="lambda-vit"),
        pytest.param(lambda: token_pool(torch.randn(4, 3), 2), id="token-pooling"),
        pytest.param(lambda: token_pool(torch.randn(1, 4, 3), 5), id="token-pooling"),
        pytest.param(lambda: token_pool(torch.randn(1, 4, 3), 2, method="mean"), id="token-pooling"),
        pytest.param(lambda: token_pool(torch.randn(1, 4, 3), 2, method="topk"), id="token-pooling"),
        pytest.param(lambda: token_pool(torch.randn(1, 4, 3), 2, -torch.ones(1, 4)), id="token-pooling"),
        pytest.param(lambda: token_pool(torch.randn(1, 4, 3), 2, torch.ones(1, 3)), id="token-pooling"),
        pytest.param(lambda: PooledViT(vit(), {7: 2}), id="token-pooling"),
        pytest.param(lambda: DCAL(vit(), 3, 0.0), id="dcal"),
        pytest.param(lambda: DCAL(made(reg_tokens=1), 3), id="dcal"),
        pytest.param(lambda: rollout([]), id="dcal"),
        pytest.param(lambda: chosen(torch.rand(1, 5, 5), 1.5), id="dcal"),
        pytest.param(lambda: TestTimeRegisters(vit(), {0: [32]}), id="test-time-registers"),
        pytest.param(lambda: TestTimeRegisters(vit(), {5: [1]}), id="test-time-registers"),
        pytest.param(lambda: TestTimeRegisters(vit(), {0: [1]}, 0), id="test-time-registers"),
        pytest.param(lambda: TestTimeRegisters(vit(), {0: [1]}, patches="half"), id="test-time-registers"),
        pytest.param(lambda: TestTimeRegisters(vit(), {0: [1]}, 1, place=0), id="test-time-registers"),
        pytest.param(lambda: TestTimeRegisters(vit(), {0: [1]}, 0, place=4)(X), id="test-time-registers"),
        pytest.param(lambda: find_register_neurons(vit(), X[:0], 1.0), id="test-time-registers"),
    ],
)
def test_refusals(make):
    with pytest.raises(RegardError, match="expected"):
        make()
