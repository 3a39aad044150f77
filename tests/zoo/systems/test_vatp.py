"""VATP: sizes of what stays, by shares of the prompt, and policies that leave decoding alone."""

import pytest
import torch

pytest.importorskip("transformers")
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.vatp import VATP


@pytest.mark.parametrize(
    ("options", "prompt", "kept"),
    [
        ({"sink": 2}, 31, 7 + 7),
        ({"sink": 2, "heavy": 0.5, "recent": 0.1}, 31, 15 + 3),
        ({"base": "scissorhands", "sink": 2, "heavy": 0.4}, 31, 10 + 2 * 12 - 10),
        ({"base": "scissorhands", "sink": 2, "heavy": 0.1}, 31, 10),
        ({"sink": 0, "heavy": 0.0, "recent": 0.01}, 31, 1),
    ],
)
def test_how_many_entries_stay(options, prompt, kept):
    model, ids = llama(layers=2), torch.randint(1, 50, (1, prompt))
    for decode, more in ((True, 0), (False, 4)):
        with VATP(decode=decode, **options)(model) as session:
            model.generate(ids, max_new_tokens=5, do_sample=False)
        assert {int(part.alive.sum(-1).max()) for layer in session.cache.layers for part in layer.parts} == {kept + more}


def test_first_options():
    assert (VATP().sink, VATP().window, VATP().values, VATP().base) == (20, 400, True, "h2o")
