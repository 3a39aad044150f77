"""The two nets of images that come with regard, and the real images they were trained on."""

import json

import pytest
import torch

from regard import RegardError, models
from regard.models import vision
from regard.tasks.digits import digits, photo_patches, photographs, rotated, written


@pytest.mark.parametrize("name", ["digits-vit", "digits-resnet"])
@torch.no_grad()
def test_names_digits_on_photographs_that_nobody_was_trained_on(name):
    model, told = models.load(name), json.loads((models.path(name) / "training.json").read_text())
    drawn = digits(500, torch.Generator().manual_seed(3), held_out=True)
    right = (model(drawn.images).argmax(1) == drawn.labels).float().mean().item()
    assert right > told["probes"]["digit"]["pixels"] + 0.2 and right == pytest.approx(told["probes"]["digit"]["model"], abs=0.06)
    assert told["probes"]["photograph"]["features"] > told["probes"]["photograph"]["pixels"] + 0.1
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert told["parameters"] == sum(p.numel() for p in model.parameters())


def test_small_and_refused(tmp_path):
    sizes = [(models.path(name) / "model.safetensors").stat().st_size for name in models.names("image")]
    assert sum(sizes) < 4e6 and models.names("text") == ["smollm2-135m", "tiny"]
    with pytest.raises(RegardError, match="takes no options"):
        models.load("digits-vit", dtype=torch.float32)
    with pytest.raises(RegardError, match="reads images"):
        models.tokenizer("digits-vit")
    with pytest.raises(RegardError, match="expected 'text' or 'image'"):
        models.names("sound")
    (tmp_path / "config.json").write_text((models.path("digits-vit") / "config.json").read_text())
    with pytest.raises(RegardError, match="as it came"):
        vision.load("digits-vit", tmp_path)


def test_images_are_real_seeded_and_apart():
    ink, labels = written()
    other, _ = written(held_out=True)
    assert (
        len(ink) == 1437 and len(other) == 360 and set(labels.tolist()) == set(range(10)) and 0 <= float(ink.min()) <= float(ink.max()) == 1
    )
    known = {tuple(x.flatten().tolist()) for x in ink}
    assert not any(tuple(x.flatten().tolist()) in known for x in other)
    assert len(photographs()) == 14 and all(x.shape[0] == 3 and min(x.shape[1:]) == 128 for x in photographs())
    a, b = (digits(6, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.images, b.images) and a.images.shape == (6, 3, 32, 32) and a.ink.shape == (6, 32, 32)
    plain = digits(4, torch.Generator().manual_seed(1), side=48, background="plain")
    torch.testing.assert_close(plain.images, ((plain.ink - 0.5) / 0.25)[:, None].expand(-1, 3, -1, -1))
    hidden = digits(4, torch.Generator().manual_seed(1), occluded=0.25)
    rows = (hidden.images == 0).all(3).all(1)
    assert rows.sum(1).tolist() == [8] * 4 and float(hidden.ink[rows].abs().max()) == 0
    assert digits(0, torch.Generator()).images.shape == (0, 3, 32, 32) and rotated(torch.zeros(0, 3, 4, 4), torch.Generator())[0].shape == (
        0,
        3,
        4,
        4,
    )
    for bad in ({"background": "none"}, {"side": 4}, {"occluded": 1.0}, {"count": -1}):
        with pytest.raises(RegardError, match="expected 'photograph' or 'plain'"):
            digits(**{"count": 1, "generator": torch.Generator(), **bad})


def test_ink_inverts_what_is_behind():
    drawn = digits(3, torch.Generator().manual_seed(5))
    full = drawn.ink > 0.999
    assert bool(full.any())
    again, _ = photo_patches(2, torch.Generator().manual_seed(2))
    turned, turns = rotated(again, torch.Generator().manual_seed(0))
    assert torch.equal(turned[0], again[0].rot90(int(turns[0]), (1, 2)))
    held, which = photo_patches(40, torch.Generator().manual_seed(4), held_out=True)
    for piece, number in zip(held, which.tolist()):  # a held-out piece stands in the right quarter, itself or mirrored
        picture = (photographs()[number][:, :, -max(photographs()[number].shape[2] // 4, 32) :] - 0.5) / 0.25
        seen = picture.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
        assert min(float((seen - one).abs().amax((2, 3, 4)).min()) for one in (piece, piece.flip(-1))) == 0
