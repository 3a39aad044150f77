"""Stages of training by which models are converted: what learns, by which rates and losses, as the papers' recipes say."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import adapt
from regard.zoo.systems import acm, hgf, liger, lolcats, lragent

QKV = ("q_proj", "k_proj", "v_proj")
PLATEAU = {"schedule": "plateau", "final_lr": 1e-5, "accumulate": 8}
# stage, its kind and what differs from such a stage's own defaults
STAGES = {
    "acm distilling": (acm.distilling(7), adapt.Transfer, {"learn": ("*.w1", "*.w2", "*.b1", "*.b2"), "loss": acm.distilled}),
    "acm gating": (acm.gating(7, released=True, factor=1.5), adapt.Transfer, {"learn": ("*.gate.*",), "loss": acm.GateLoss(1.5, True)}),
    "acm budgeted": (
        acm.budgeted(7, 0.4, loss={"weight": 2.0, "kind": "l2"}, clip=1.0),
        adapt.Tune,
        {"lr": 1e-4, "loss": acm.BudgetLoss(0.4, 2.0, "l2"), "clip": 1.0},
    ),
    "liger": (liger.liger_lora(7), adapt.Lora, {"targets": QKV, "accumulate": 8, "clip": 1.0}),
    "liger otherwise": (
        liger.liger_lora(7, 0.5, 3, targets=("q_proj",), clip=None),
        adapt.Lora,
        {"lr": 0.5, "rank": 3, "targets": ("q_proj",), "accumulate": 8},
    ),
    "lolcats transfer": (
        lolcats.attention_transfer(7),
        adapt.Transfer,
        {"lr": 1e-2, "learn": ("*_map", "*.gamma"), "loss": lolcats.heads_matched, "scale": 1000.0, **PLATEAU},
    ),
    "lolcats finetune": (lolcats.lora_finetune(7), adapt.Lora, {"lr": 1e-4, "alpha": 16, **PLATEAU}),
    "lolcats otherwise": (
        lolcats.lora_finetune(7, 0.5, 3, 4.0, accumulate=1),
        adapt.Lora,
        {"lr": 0.5, "rank": 3, "alpha": 4.0, **PLATEAU, "accumulate": 1},
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages(name):
    stage, kind, own = STAGES[name]
    assert stage == kind(7, **own)


def test_hgf_and_lragent_hand_their_recipe_on(monkeypatch):
    seen, kept = [], []

    def fit(model, draw, loss, steps, **options):
        seen.append((steps, options, draw(torch.Generator().manual_seed(0))))
        kept.append((model, loss))

    class Text:
        def batch(self, batch, length, generator):
            return batch, length

        def held_out(self, length, count):
            return torch.zeros(count, length + 1, dtype=torch.long)

    monkeypatch.setattr(hgf, "fit", fit)
    first = hgf.losses(Text(), 5, names=("full", "hgf"), seed=3, lr=0.5, batch=4, length=6, dim=16, layers=1, heads=2)
    assert seen == [(5, {"lr": 0.5, "seed": 3, "optimizer": "adamw"}, (4, 6))] * 2 and list(first) == ["full", "hgf"]
    other = hgf.losses(Text(), 5, names=("full",), seed=4, length=6, dim=16, layers=1, heads=2)
    assert seen[-1] == (5, {"lr": 3e-3, "seed": 4, "optimizer": "adamw"}, (16, 6)) and other["full"] != first["full"]
    held = hgf.losses(Text(), 5, names=("full", "hgf"), length=6, openness=5.0, dim=16, layers=1, heads=2)
    ids = torch.randint(256, (3, 7))
    for (model, loss), weight in zip(kept[-2:], (0, 5), strict=True):
        task = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert torch.allclose(loss(ids), task + (weight * hgf.penalty(model) if weight else 0)) and list(held) == ["full", "hgf"]
    seen.clear()
    from regard.lab.checks.shared.decoding import llama

    monkeypatch.setattr(lragent, "fit", fit)
    model = llama()

    def draw(generator):
        ids = torch.randint(1, 50, (2, 5), generator=generator)
        return ids, ids > 9

    found = lragent.train_roles(model, {"a": draw, "b": draw}, rank=3, alpha=12.0, steps=6, lr=0.25, seed=2)
    assert [(steps, options) for steps, options, _ in seen] == [(6, {"lr": 0.25, "seed": 2})] * 3  # together, then each role
    assert [len(ids) for _, _, (ids, _) in seen] == [4, 2, 2] and found["a"].scale == 4.0
    again, third = (lragent.train_roles(model, {"a": draw}, rank=3, steps=1, seed=seed)["a"] for seed in (2, 3))
    assert all(torch.equal(x, y) for x, y in zip(found["a"].a_q, again.a_q, strict=True)) and not torch.equal(
        found["a"].a_q[0], third.a_q[0]
    )
    one = found["b"]
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(one.a_q, found["a"].a_q, strict=True))
    assert all(not x.any() for x in (*one.b_q, *one.b_v)) and one.a_q[0].shape == (3, 32) and one.b_v[0].shape == (16, 3)
    spread = torch.cat([x.flatten() for x in (*one.a_q, *one.a_v)])
    assert 0.8 < float(spread.std()) * 32**0.5 < 1.2
