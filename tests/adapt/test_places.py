"""Wherever a model puts its tokens (padded rows, packed documents, slots of a cache), each row gives what it gives alone."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
import loops  # noqa: E402

import regard  # noqa: E402
from regard import adapt  # noqa: E402

loops.register()
LENGTHS = (12, 7, 1)


def rows():
    torch.manual_seed(1)
    return [torch.randint(3, 97, (length,)) for length in LENGTHS]


def padded(left):
    """ids and mask (3, 12)."""
    ids, keep = torch.zeros(3, max(LENGTHS), dtype=torch.long), torch.zeros(3, max(LENGTHS), dtype=torch.long)
    for at, row in enumerate(rows()):
        place = slice(-len(row), None) if left else slice(0, len(row))
        ids[at, place], keep[at, place] = row, 1
    return ids, keep


def places_of(keep):
    return (keep.cumsum(-1) - 1).clamp_min(0)


def close(got, want):
    torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-4)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", loops.FORMULA)
@torch.no_grad()
def test_padded_rows(name, left, how):
    model, (ids, keep) = loops.llama(how), padded(left)
    want = [loops.alone(model, name, row) for row in rows()]
    with adapt.patch(model, loops.FORMULA[name][0]):
        got = model(ids, attention_mask=keep, position_ids=places_of(keep), use_cache=False).logits
    for at in range(3):
        close(got[at][keep[at].bool()], want[at])


@pytest.mark.parametrize("name", loops.FORMULA)
@torch.no_grad()
def test_packed_documents(name):
    model = loops.llama()
    want = torch.cat([loops.alone(model, name, row) for row in rows()])
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    with adapt.patch(model, loops.FORMULA[name][0]):
        got = model(torch.cat(rows())[None], position_ids=places[None], use_cache=False).logits[0]
    close(got, want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", loops.FORMULA)
@torch.no_grad()
def test_prompt_then_token_by_token(name, padding, cache):
    """A prompt, three tokens at once, then one at a time, through a cache."""
    model, (ids, keep) = loops.llama(), padded(True)
    if padding == "none":
        ids, keep = ids[:1], keep[:1]
    want = [loops.alone(model, name, row) for row in rows()][: len(ids)]
    kept = (
        transformers.DynamicCache(config=model.config) if cache == "dynamic" else transformers.StaticCache(model.config, max_cache_len=20)
    )
    got = []
    with adapt.patch(model, loops.FORMULA[name][0]):
        for begin, end in ((0, 6), (6, 9), (9, 10), (10, 11), (11, 12)):
            mask = None if padding == "none" else keep[:, :end]
            step = {"position_ids": places_of(keep)[:, begin:end], "past_key_values": kept, "use_cache": True}
            got.append(model(ids[:, begin:end], attention_mask=mask, **step).logits)
    got = torch.cat(got, 1)
    for at, row in enumerate(want):
        close(got[at][keep[at].bool()], row)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", loops.FORMULA)
@torch.no_grad()
def test_generated_tokens(name, cache):
    """Greedy tokens of a left-padded batch are those of the row alone, found one by one without a cache."""
    model, (ids, keep) = loops.llama(), padded(True)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": True,
        "cache_implementation": cache,
    }
    with adapt.patch(model, loops.FORMULA[name][0]):
        got = model.generate(ids[:2], attention_mask=keep[:2], **options, disable_compile=True)
    eos = model.generation_config.eos_token_id
    for at, row in enumerate(rows()[:2]):
        for _ in range(3):
            logits = loops.alone(model, name, row)[-1]
            logits[[] if eos is None else eos] = -torch.inf
            row = torch.cat((row, logits.argmax()[None]))
        assert torch.equal(got[at, -3:], row[-3:])


RELATIVE = ("softmax", "relu by count", "ssmax", "window", "alibi", "phase")


def windowed(name, size):
    """The formula over the last `size` keys, as a model with a sliding window means it."""
    _, weights_of = loops.FORMULA[name]

    def inside(q, k, i, scale):
        first = max(0, i + 1 - size)
        return [0.0] * first + weights_of(q, k[first:], i - first, scale)

    return inside


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", RELATIVE)
@torch.no_grad()
def test_sliding_windows_of_the_model(name, cache, monkeypatch):
    """Distances and counts survive a cache that forgets its oldest keys."""
    inside = f"{name} in a window"
    monkeypatch.setitem(loops.FORMULA, inside, (None, windowed(name, 5)))
    loops.register()
    model, ids = loops.llama(kind="mistral", sliding_window=5), rows()[0]
    want = loops.alone(model, inside, ids)
    with adapt.patch(model, loops.FORMULA[name][0]):
        if cache is None:
            return close(model(ids[None], use_cache=False).logits[0], want)
        kept = (
            transformers.DynamicCache(config=model.config)
            if cache == "dynamic"
            else transformers.StaticCache(model.config, max_cache_len=20)
        )
        parts = [(0, 3), (3, 7), *((at, at + 1) for at in range(7, 12))]
        got = [model(ids[None, a:b], past_key_values=kept, use_cache=True).logits[0] for a, b in parts]
    close(torch.cat(got), want)


@pytest.mark.parametrize("name", ["window and sinks", "function of places", "blocks"])
@torch.no_grad()
def test_places_that_a_cache_forgot(name):
    model, ids = loops.llama(kind="mistral", sliding_window=5), rows()[0][None]
    with adapt.patch(model, loops.FORMULA[name][0]), pytest.raises(regard.RegardError, match="forgets those more than 5 back"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("name", ["running state", "fading state"])
@torch.no_grad()
def test_a_state_under_a_window(name):
    model = loops.llama(kind="mistral", sliding_window=5)
    with adapt.patch(model, loops.FORMULA[name][0]), pytest.raises(regard.RegardError, match="running state"):
        model(rows()[0][None], use_cache=False)
