"""Chunked attention inside others' modules, and TabPFNLite: bad input, gradients, and modules with drawn sizes."""

import pytest
import torch
import torch.nn.functional as F

from regard import RegardError
from regard.zoo.systems.chunked_tabpfn import TabPFNLite, chunked_attention, chunking


def test_other_modules_run_in_chunks():
    timm = pytest.importorskip("timm")
    from regard.adapt import replace  # noqa: F401  (makes room for torchvision's operators)

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=5).eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        before = vit(x)
        with chunking(q_chunk=5, k_chunk=4, batch_chunk=2):
            assert torch.allclose(vit(x), before, atol=1e-5)
        assert torch.equal(vit(x), before)
    q = torch.randn(1, 2, 9, 4)
    for options in ({"is_causal": True}, {"attn_mask": torch.zeros(9, 9)}, {"dropout_p": 0.5}):
        with chunking(), pytest.raises(RegardError, match="without masks, causality or dropout"):
            F.scaled_dot_product_attention(q, q, q, **options)


def test_half_precision_and_empty_batches():
    q = torch.randn(2, 2, 33, 8)
    truth = F.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(chunked_attention(*(q.bfloat16(),) * 3, 7, 9).float(), truth, atol=0.03)
    assert chunked_attention(q[:0], q[:0], q[:0], 7, 9).shape == (0, 2, 33, 8)
    for name in ("q_chunk", "k_chunk", "batch_chunk"):
        with pytest.raises(RegardError, match=name):
            chunked_attention(q, q, q, **{name: -1})


def test_gradients_reach_all_parameters():
    model = TabPFNLite(classes=3, dim=8, heads=2, layers=2, group=2)
    for p in model.parameters():
        p.data.normal_(std=0.3)
    model(torch.randn(2, 9, 3), torch.randint(0, 3, (2, 6))).sin().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bad_input():
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    with pytest.raises(RegardError, match="before fit"):
        TabPFNLite().predict(x)
    model = TabPFNLite(most_features=3).fit(x, y)
    assert model.predict(x[:0]).shape == (0,)
    for wrong, told in ((x[:, :2], r"\(rows, 3\) as fitted"), (x[None], "as fitted")):
        with pytest.raises(RegardError, match=told):
            model.predict(wrong)
    for bad_x, bad_y, told in (
        (x, y + 1, "classes 0 to 1"),
        (x * float("nan"), y, "fill missing"),
        (x, y[:0], "0 < n <= N"),
        (torch.randn(8, 4), y, "most_features"),
    ):
        with pytest.raises(RegardError, match=told):
            TabPFNLite(most_features=3).fit(bad_x, bad_y)
    for options in ({"classes": 1}, {"dim": 30}, {"heads": 3}, {"layers": 0}):
        with pytest.raises(RegardError, match="expected at least 2"):
            TabPFNLite(**options)
    constant = torch.cat((x[:, :2], torch.ones(8, 1)), 1)
    assert TabPFNLite().fit(constant, y).predict_proba(constant).isfinite().all()


def test_sizes_eps_and_scale():
    model = TabPFNLite(3, 16, 2, 2, hidden=24, group=2, eps=1e-3, most_features=5)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3} and model.place.shape == (3, 4)
    assert [m.out_features for m in model.head if isinstance(m, torch.nn.Linear)] == [32, 3] and model.y_in.in_features == 4
    widths = {m.out_features for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)}
    assert 24 in widths and 32 in {
        m.out_features for layer in TabPFNLite(dim=16).layers for m in layer.modules() if hasattr(m, "out_features")
    }
    assert torch.equal(TabPFNLite().place, TabPFNLite(seed=0).place) and not torch.equal(TabPFNLite().place, TabPFNLite(seed=1).place)
    q = torch.randn(3, 2, 9, 4)
    with chunking(4, 5, 2):
        found = F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], scale=0.2, enable_gqa=True)
    assert torch.allclose(found, (0.2 * q @ q[:, :1].mT).softmax(-1) @ q[:, :1], atol=1e-6)


def test_features_are_standardised_by_the_training_rows():
    model, x, y = TabPFNLite(2, 8, 2, 1), torch.randn(1, 9, 3), torch.randint(0, 2, (1, 6))
    moved = x * torch.tensor([3.0, 0.1, 50]) + torch.tensor([5.0, -1, 2])
    assert torch.allclose(model(x, y), model(moved, y), atol=1e-4)
    mean, std = model.scales(x[:, :6])
    assert torch.allclose(mean, x[:, :6].sum(1, keepdim=True) / 6)
    assert torch.allclose(std, ((x[:, :6] - mean).square().sum(1, keepdim=True) / 6).sqrt())
    assert float(model.scales(torch.ones(1, 4, 1))[1]) == pytest.approx(1e-6)
