"""Each generator of sets, shapes, photographs, voices and videos: its answers are exact, its draws are the generator's, its options are refused."""

import math

import pytest
import torch

from regard import RegardError
from regard.tasks import images, mixtures, restoration, sets, shapes, video


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


ALL = {
    "maxima": lambda n, g: sets.maxima(n, g),
    "unique": lambda n, g: sets.unique_items(n, g),
    "odd": lambda n, g: sets.odd_one(n, g),
    "clusters": lambda n, g: sets.clusters(n, g),
    "shapes": lambda n, g: shapes.textured_shapes(n, g),
    "glyphs": lambda n, g: images.coloured_glyphs(n, g),
    "noisy": lambda n, g: restoration.noisy_patches(n, g, 16),
    "small": lambda n, g: restoration.small_patches(n, g, 16),
    "video": lambda n, g: video.moving_digits(n, g),
    "voices": lambda n, g: mixtures.voices(n, g, 400),
}


@pytest.mark.parametrize("name", ALL)
def test_the_generator_alone_decides(name):
    torch.manual_seed(0)
    one = ALL[name](3, seeded())
    torch.manual_seed(1)
    again, other, none = ALL[name](3, seeded()), ALL[name](3, seeded(1)), ALL[name](0, seeded())
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True)) and not torch.equal(one[0], other[0])
    assert all(x.isfinite().all() for x in one) and all(len(x) == 0 and x.shape[1:] == y.shape[1:] for x, y in zip(none, one, strict=True))


def test_sets():
    x, keep, top = sets.maxima(200, seeded())
    assert all(float(top[b]) == max(x[b, keep[b], 0].tolist()) for b in range(200)) and set(keep.sum(1).tolist()) == set(range(1, 11))
    x, keep, count = sets.unique_items(200, seeded(), noise=0.0)
    assert (
        all(int(count[b]) == len({tuple(row) for row in x[b, keep[b]].tolist()}) for b in range(200)) and int(count.unique().numel()) >= 7
    )
    x, keep, at = sets.odd_one(200, seeded(), noise=0.0)
    for b in range(200):
        rows = [tuple(row) for row in x[b, keep[b]].tolist()]
        assert rows.count(rows[at[b]]) == 1 and len(set(rows)) == 2
    x, keep, centres = sets.clusters(50, seeded(), spread=0.01)
    near = torch.cdist(x, centres).amin(2)
    assert float(near[keep].max()) < 0.1 and float(x[~keep].abs().max()) == 0 and keep.sum(1).min() >= 50


def test_likelihood_of_a_mixture_by_hand():
    x, keep = torch.tensor([[[0.0, 1.0], [2.0, -1.0], [9.0, 9.0]]]), torch.tensor([[True, True, False]])
    told = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0], [math.log(3), 2.0, 0.0, math.log(2), 0.0]]])
    total = 0.0
    for a, b in ((0.0, 1.0), (2.0, -1.0)):
        first = math.exp(-(a**2 + (b - 1) ** 2) / 2) / (2 * math.pi)
        second = math.exp(-(((a - 2) / 2) ** 2 + b**2) / 2) / (2 * math.pi * 2)
        total += math.log(first / 4 + second * 3 / 4) / 2
    assert float(sets.mixture_log_likelihood(x, keep, told)) == pytest.approx(total, abs=1e-6)


def test_colours_tell_glyphs_where_they_are_shared_alone():
    for share, told in ((1.0, 1.0), (0.0, 0.25)):
        x, label, ink = images.coloured_glyphs(400, seeded(), share, noise=0.0)
        assert (ink.flatten(1).sum(1) == 64).all() and (x.permute(0, 2, 3, 1)[ink].abs() == 1).all()
        assert not ink[:, 0].any() and not ink[:, -1].any() and not ink[:, :, 0].any() and not ink[:, :, -1].any()
        looks = {}
        for image, kind, where in zip(x, label.tolist(), ink, strict=True):
            assert torch.equal(looks.setdefault(kind, image[:, where]), image[:, where])
        assert len(looks) == 4 and len({tuple(look.flatten().tolist()) for look in looks.values()}) == 4
        colours = {tuple(x[b, :, 0, 0].tolist()) for b in range(400)}
        own = {kind: tuple(x[int((label == kind).nonzero()[0]), :, 0, 0].tolist()) for kind in range(4)}
        assert len(colours) == 4 and all(sum(c**2 for c in colour) == pytest.approx(3) for colour in colours)
        share_of_own = sum(tuple(x[b, :, 0, 0].tolist()) == own[int(label[b])] for b in range(400)) / 400
        assert share_of_own == pytest.approx(told, abs=0.2)


def test_shapes_and_textures_say_nothing_of_one_another():
    drawn = shapes.textured_shapes(2000, seeded(), side=24, noise=0.0)
    table = torch.zeros(4, 4)
    table.index_put_((drawn.shape, drawn.texture), torch.ones(2000), accumulate=True)
    assert float((table / 2000 - 1 / 16).abs().max()) < 0.02
    inside = drawn.images[:, 0][drawn.ink]
    assert abs(float(inside.mean())) < 0.05 and float(inside.std()) == pytest.approx(1, abs=0.05)
    assert float(drawn.images[:, 0][~drawn.ink].std()) == pytest.approx(1, abs=0.05)
    across = (drawn.images[:, 0, :, 1:] - drawn.images[:, 0, :, :-1]).abs()
    flat = drawn.ink[:, :, 1:] & drawn.ink[:, :, :-1] & (drawn.texture == 0)[:, None, None]
    assert float(across[flat].max()) < 1e-4  # horizontal stripes do not change along rows
    shares = [float(drawn.ink[drawn.shape == at].float().mean()) for at in range(4)]
    assert shares[0] > shares[3] and shares[1] > shares[2]  # square, disc, cross, ring
    whole = shapes.textured_shapes(400, seeded(), cover=(1.0, 1.0), side=32)
    rings = whole.ink[whole.shape == 3]
    assert not rings[:, 16, 16].any() and whole.ink[whole.shape != 3][:, 16, 16].all() and rings[:, 16, 1].all()


def test_photographs_made_worse():
    noisy, clean = restoration.noisy_patches(20, seeded(), 16)
    assert float(restoration.psnr(noisy, clean).mean()) == pytest.approx(20 * math.log10(255 / 25), abs=0.3)
    small, whole = restoration.small_patches(4, seeded(), 16, 4)
    assert small.shape == (4, 3, 4, 4) and float((small.mean((2, 3)) - whole.mean((2, 3))).abs().max()) < 0.15
    same, whole = restoration.small_patches(4, seeded(), 16, 1)
    assert torch.equal(same, whole)


def test_digits_move_as_told():
    drawn = video.moving_digits(40, seeded(), frames=12, side=20, digits=2)
    assert drawn.frames.shape == (40, 12, 1, 20, 20) and drawn.labels.shape == (40, 2) and int(drawn.labels.max()) <= 9
    assert float(drawn.places.min()) >= 0 and float(drawn.places.max()) <= 12
    steps = (drawn.places[:, 1:] - drawn.places[:, :-1]).norm(dim=-1)
    assert float(steps.max()) <= 2.001 and float(steps.amax(1).min()) >= 0.7
    one = video.moving_digits(60, seeded(1), frames=2, side=40, speed=(2.0, 2.0))
    mass = (one.frames[:, :, 0] / 4 + 0.5).double()
    axis = torch.arange(40)
    middle = torch.stack([(mass * axis[:, None]).sum((2, 3)), (mass * axis).sum((2, 3))], -1) / mass.sum((2, 3))[..., None]
    moved, told = middle[:, 1] - middle[:, 0], (one.places[:, 1] - one.places[:, 0])[:, 0]
    assert float((moved - told).abs().max()) < 0.3
    free = ((one.places[:, 0, 0] > 2) & (one.places[:, 0, 0] < 30)).all(1)
    ways = torch.where(told.abs().argmax(1) == 1, torch.where(told[:, 1] > 0, 0, 2), torch.where(told[:, 0] > 0, 1, 3))
    assert torch.equal(ways[free], one.heading[free, 0])


def test_voices_have_their_pitch_and_pauses():
    mixture, sources = mixtures.voices(6, seeded(), 8000)
    assert torch.allclose(mixture, sources.sum(1)) and torch.allclose(sources.square().mean(-1), torch.ones(6, 2), atol=1e-4)
    power = torch.fft.rfft(sources).abs().square()  # one second: a bin is a hertz
    low = [float((power[:, k, :85].sum(-1) / power[:, k].sum(-1)).max()) for k in range(2)]
    assert max(low) < 0.05 and float((power[..., 3000:].sum(-1) / power.sum(-1)).max()) < 0.1
    loud = sources.unfold(-1, 80, 80).square().mean(-1)
    assert float((loud < 0.05).float().mean()) > 0.1 and float(loud.max()) > 1.5


@pytest.mark.parametrize(
    "make",
    [
        lambda g: sets.maxima(2, g, least=0),
        lambda g: sets.maxima(2, g, least=5, most=4),
        lambda g: images.coloured_glyphs(2, g, size=14),
        lambda g: images.coloured_glyphs(2, g, share=1.5),
        lambda g: images.coloured_glyphs(2, g, kinds=1),
        lambda g: shapes.textured_shapes(2, g, side=4),
        lambda g: shapes.textured_shapes(2, g, cover=(0.9, 0.5)),
        lambda g: restoration.noisy_patches(2, g, spread=-1),
        lambda g: restoration.small_patches(2, g, side=10, scale=3),
        lambda g: restoration.psnr(torch.zeros(2, 3), torch.zeros(2, 4)),
        lambda g: video.moving_digits(2, g, side=7),
        lambda g: video.moving_digits(2, g, speed=(2.0, 1.0)),
    ],
)
def test_options_are_refused(make):
    with pytest.raises(RegardError, match="expected"):
        make(seeded())
