"""The policy run by its recipe, losses where nothing counts, and groups that hardly differ."""

from __future__ import annotations

import pytest
import torch

from regard import RegardError
from regard.zoo.linear.minimax_01 import MiniMaxConfig, MiniMaxLike
from regard.zoo.linear.minimax_m1 import (
    LOSSES,
    PolicyRun,
    cispo_loss,
    dapo_loss,
    group_advantages,
    grpo_loss,
    policy_run,
    ppo_loss,
    sampled,
)


def test_rewards_of_a_run_are_those_of_its_recipe() -> None:
    rounds, prompts, group, digits, answer, updates, lr, seed = 3, 3, 4, 3, 2, 2, 0.02, 1
    run = policy_run("dapo", rounds, prompts, group, digits, answer, updates, lr, seed)
    torch.manual_seed(seed)
    model = MiniMaxLike(MiniMaxConfig(vocab=4, dim=32, layers=4, heads=2, kv_heads=1, period=4, hidden=48, experts=1))
    optimiser = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    rewards = []
    for _ in range(rounds):
        asked = torch.randint(digits, (prompts,))
        prompt = torch.tensor([[digits, int(first)] for first in asked for _ in range(group)])
        tokens, old = sampled(model, prompt, answer)
        assert int(tokens.max()) < digits
        right = [float((a + b) % digits == first) for (a, b), (_, first) in zip(tokens.tolist(), prompt.tolist(), strict=True)]
        rewards.append(sum(right) / len(right))
        each = torch.tensor(right).view(prompts, group)
        gain = (each - each.mean(1, keepdim=True)) / each.std(1, correction=0, keepdim=True)
        gain = torch.where(gain.isfinite(), gain, 0.0).flatten()
        for _ in range(updates):
            logits = model(torch.cat((prompt, tokens), 1))[:, 1:-1, :digits]
            logp = torch.stack([logits[:, t].log_softmax(-1)[torch.arange(len(tokens)), tokens[:, t]] for t in range(answer)], 1)
            optimiser.zero_grad()
            dapo_loss(logp, old, gain, torch.ones(tokens.shape, dtype=torch.bool)).backward()
            optimiser.step()
    assert run == PolicyRun(tuple(pytest.approx(r) for r in rewards), "dapo")  # type: ignore[arg-type]
    assert len(set(rewards)) > 1  # the course can be told from a constant


def test_a_run_draws_its_rewards_and_refuses_unknown_losses() -> None:
    svg = PolicyRun((0.25, 0.75), "cispo").plot()
    assert all(text in svg for text in ("Rewards", ">round<", ">mean reward<"))
    assert {"cispo": cispo_loss, "ppo": ppo_loss, "grpo": grpo_loss, "dapo": dapo_loss} == LOSSES
    with pytest.raises(RegardError, match="loss='other'; expected one of cispo, ppo, grpo, dapo"):
        policy_run("other")


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_count_for_nothing(loss: str) -> None:
    """Whatever stands there, infinities too; a response, or a batch, of none has loss zero."""
    torch.manual_seed(0)
    logp, gain = -torch.rand(3, 4), torch.randn(3)
    old = logp + 0.1 * torch.rand(3, 4)  # nothing is clipped
    mask = torch.tensor([[True, True, False, False], [True, False, True, True], [False] * 4])
    held, wild = (torch.where(mask, logp, fill).requires_grad_() for fill in (-1.0, float("-inf")))
    values = [LOSSES[loss](x, torch.where(mask, old, 0.0), gain, mask) for x in (held, wild)]
    assert values[0].isfinite() and torch.equal(*values)
    slopes = [torch.autograd.grad(value, x)[0] for value, x in zip(values, (held, wild), strict=True)]
    assert torch.equal(*slopes) and not slopes[0][~mask].any() and slopes[0][mask].all()
    assert float(LOSSES[loss](held, old, gain, torch.zeros_like(mask))) == 0
    # One and a half of the rows: a response without tokens is averaged as zero by grpo, and left out by the others.
    rows = LOSSES[loss](held[:2], old[:2], gain[:2], mask[:2])
    torch.testing.assert_close(values[0], rows * 2 / 3 if loss == "grpo" else rows)


def test_a_group_that_differs_by_rounding_is_equal() -> None:
    rewards = torch.tensor([[1.0, 1.0 + 1e-7, 1.0], [0.0, 3e-3, 0.0]])
    gain = group_advantages(rewards)
    assert not gain[0].any() and gain[1].tolist() == pytest.approx([-(0.5**0.5), 2**0.5, -(0.5**0.5)])
    assert not group_advantages(rewards, eps=0.01).any() and not group_advantages(torch.ones(2, 3), eps=0.0).any()


@pytest.mark.parametrize("at", range(4))
def test_shapes_that_do_not_belong_together(at: int) -> None:
    given = [torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3), torch.ones(3, 4, dtype=torch.bool)]
    given[at] = torch.zeros(5, 4)[..., : 4 if at != 2 else 1].squeeze(-1).to(given[at].dtype)
    with pytest.raises(RegardError, match="one advantage a response"):
        cispo_loss(*given)
