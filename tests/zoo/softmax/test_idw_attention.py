"""Inverse distances: links and powers by hand, the classifier of prototypes, prototypes added by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import regard
from regard.zoo.softmax.idw_attention import IDWClassifier

SCORES = {
    "log": lambda d, power, eps: -math.log(eps + d**power),
    "negative": lambda d, power, eps: -(eps + d**power),
    "gaussian": lambda d, power, eps: -(eps + d**power) / 2,
    "inverse": lambda d, power, eps: 1 / (eps + d**power),
}


def by_hand(q: Tensor, k: Tensor, v: Tensor, link: str, power: float, eps: float) -> Tensor:
    rows = []
    for a in q:
        s = [SCORES[link](float((a - b).norm()), power, eps) for b in k]
        e = [math.exp(x - max(s)) for x in s]
        rows.append(torch.tensor([x / sum(e) for x in e], dtype=torch.float64) @ v)
    return torch.stack(rows)


@pytest.mark.parametrize("link", SCORES)
@pytest.mark.parametrize(("power", "eps"), [(2.0, 1e-3), (3.0, 0.2), (10.0, 1e-3)])
def test_links_and_powers(link: str, power: float, eps: float) -> None:
    q, k, v = (0.6 * torch.randn(1, 1, 9, 3, dtype=torch.float64) for _ in range(3))
    given = {} if (power, eps) == (2.0, 1e-3) else {"power": power, "eps": eps}
    mechanism = regard.get("idw-attention", **(given if link == "log" else given | {"link": link}))
    torch.testing.assert_close(regard.attend(q, k, v, mechanism)[0, 0], by_hand(q[0, 0], k[0, 0], v[0, 0], link, power, eps))


@pytest.mark.parametrize("link", [*SCORES, "dot"])
def test_the_classifier(link: str) -> None:
    model, x = IDWClassifier(3, 7, 4, power=3.0, eps=0.1, link=link).double(), torch.randn(5, 3, dtype=torch.float64)
    assert bool((model.values == 0).all()) and model.keys.shape == (7, 3)
    torch.nn.init.normal_(model.values)
    if link == "dot":
        want = (x @ model.keys.T / math.sqrt(3)).softmax(-1) @ model.values
    else:
        want = by_hand(x, model.keys.detach(), model.values.detach(), link, 3.0, 0.1)
    torch.testing.assert_close(model(x), want)


def test_the_start_of_training() -> None:
    model, x = IDWClassifier(2, 4000, 3), torch.randn(500, 2) * torch.tensor([1.0, 5.0]) + torch.tensor([3.0, -2.0])
    torch.nn.init.ones_(model.values)
    model.start_from(x)
    torch.testing.assert_close(model.keys.mean(0), x.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(model.keys.std(0), 0.1 * x.std(0), rtol=0.1, atol=0)
    assert bool((model.values == 0).all()) and (model.power, model.eps, model.link) == (2.0, 1e-3, "log")


@pytest.mark.parametrize("power", [2.0, 4.0])
def test_a_prototype_by_hand_turns_its_point_and_little_else(power: float) -> None:
    model = IDWClassifier(2, 20, 3, power=power).double()
    torch.nn.init.normal_(model.keys)
    torch.nn.init.normal_(model.values, std=3.0)
    far = torch.randn(400, 2, dtype=torch.float64)
    before = model(far).argmax(-1)
    for target in range(3):
        at = torch.tensor([3.0 + target, 3.0], dtype=torch.float64)
        held, keys = model(at[None])[0], model.keys.detach()
        model.augment(at, target)
        logits = model(at[None])[0]
        assert int(logits.argmax()) == target
        inverse = sum(1 / (1e-3 + float((at - key).norm()) ** power) for key in keys)
        assert float(model.values[-1, target]) == pytest.approx((1 + 1e-3 * inverse) * float(held.max() - held[target]))
        assert bool((model.values[-1] == 0).sum() >= 2) and torch.equal(model.keys[-1], at)
    assert len(model.keys) == 23 and float((model(far).argmax(-1) == before).double().mean()) > 0.95
