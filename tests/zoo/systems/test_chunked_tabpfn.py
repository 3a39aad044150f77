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
