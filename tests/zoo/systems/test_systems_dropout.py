"""Where layers drop, and with what probability: in training alone, what each mechanism's paper says."""

import pytest
import torch
import torch.nn.functional as F

from regard.zoo.systems import acm, bipft, lama, lina_speech, moh, mqsa_ted


def fixed(**options):
    made = acm.ACM(6, 3, 5, dropout=0.25, gate_hidden=4, **options)
    made.fixed = 2
    return made


def ids(*shape):
    return torch.randint(1, 9, shape)


def x(*shape):
    return torch.randn(*shape)


def block():
    return bipft.BinaryBlock(8, 2, 12, dropout=0.25, hidden_dropout=0.5)


def ted():
    return mqsa_ted.MQSATED(9, 6, hidden=4, dropout=0.25)


def lina():
    return lina_speech.LinaLM(9, 5, 2, dim=16, heads=2, layers=2, text_layers=3, dropout=0.25)


# the model, its call, and the shape and probability of all that is dropped, in order
DROPS = {
    "acm": (fixed, lambda m: m(x(2, 4, 6)), [((2, 4, 15), 0.25), ((2, 4, 4, 6), 0.25)]),
    "acm learners apart": (
        lambda: fixed(straight=False),
        lambda m: m(x(2, 4, 6)),
        [((8, 5), 0.25), ((8, 5), 0.25), ((2, 4, 6), 0.25)],
    ),
    "bipft": (block, lambda m: m(x(2, 5, 8)), [((2, 2, 5, 5), 0.25), ((2, 5, 8), 0.5), ((2, 5, 8), 0.5)]),
    "lama": (lambda: lama.LAMAClassifier(9, 3, 4, 5, 2, dropout=0.25), lambda m: m(ids(2, 6)), [((2, 20), 0.25)]),
    "moh": (
        lambda: moh.MoHAttention(8, 4, 1, 1, attn_drop=0.25, proj_drop=0.5),
        lambda m: m(x(2, 5, 8)),
        [((2, 4, 5, 5), 0.25), ((2, 5, 8), 0.5)],
    ),
    "mqsa-ted": (
        ted,
        lambda m: m(ids(2, 5)),
        [((2, 5, 6), 0.25), *[((2, 1, 5, 5), 0.25), ((2, 5, 4), 0.25), ((2, 5, 6), 0.25)] * 2],
    ),
    "mqsa-ted distillation": (ted, lambda m: m.distillation(torch.ones(10, 10), torch.tensor([1, 2, 3])), [((3, 6), 0.25)]),
}


@pytest.mark.parametrize("name", DROPS)
def test_what_is_dropped(name, monkeypatch):
    make, call, expected = DROPS[name]
    model, dropped, drop = make(), [], F.dropout

    def remember(values, p=0.5, training=True, inplace=False):
        if training and p:
            dropped.append((tuple(values.shape), p))
        return drop(values, p, training, inplace)

    monkeypatch.setattr(F, "dropout", remember)
    call(model.train())
    assert dropped == expected
    dropped.clear()
    call(model.eval())
    assert not dropped


def test_lina_speech_gives_its_dropout_to_every_block():
    model = lina()
    blocks = [*model.reader, *model.before, *model.behind]
    assert len(blocks) == 7 and {one.drop.p for one in blocks} == {0.25} == {model.cross.dropout} and model.cross.block.drop.p == 0
