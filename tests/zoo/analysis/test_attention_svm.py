"""Problems that do not fit."""

import pytest
import torch

import regard
from regard.zoo.analysis.attention_svm import AttentionProblem, descend, draw_problem, nuclear_svm, svm


def test_problems_of_bad_shapes_are_refused():
    problem = draw_problem()
    for call, message in (
        (lambda: AttentionProblem(problem.tokens, problem.z[:, :2], problem.labels, problem.v), "expected"),
        (lambda: problem.constraints(torch.tensor([0, 1, 9])), "chosen"),
        (lambda: descend(problem, rank=2), "saddle"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    assert nuclear_svm(problem, rank=3, starts=2).feasible and "<svg" in descend(problem, steps=3).plot()


def test_problems_are_drawn_on_the_sphere():
    for self_attention in (True, False):
        problem = draw_problem(5, 3, 7, self_attention=self_attention, seed=2)
        assert problem.tokens.shape == (5, 3, 7) and problem.tokens.dtype == torch.float64 and set(problem.labels.tolist()) <= {-1.0, 1.0}
        assert all(torch.allclose(x.norm(dim=-1), torch.ones(()).double()) for x in (problem.tokens, problem.z, problem.v))
        assert torch.equal(problem.z, problem.tokens[:, 0]) == self_attention
    assert draw_problem().tokens.shape == (3, 4, 6) and not torch.equal(draw_problem(seed=1).v, draw_problem().v)
    assert len({tuple(draw_problem(20, seed=seed).labels.tolist()) for seed in range(3)}) == 3


def test_one_step_of_descent_by_hand():
    problem = draw_problem()
    w = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(problem.loss(w), w)
    for options, truth in (({"lr": 0.3}, -0.3 * slope / slope.norm()), ({"lr": 0.3, "normalised": False}, -0.3 * slope)):
        assert torch.allclose(descend(problem, steps=1, **options).w, truth)
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    start = (0.2 * noise).requires_grad_()
    (slope,) = torch.autograd.grad(problem.loss(start), start)
    found = descend(problem, steps=1, init=0.2, seed=5)
    assert torch.allclose(found.w, start.detach() - 0.1 * slope / slope.norm())
    aim = svm(problem).w
    assert found.correlation == pytest.approx([float((found.w * aim).sum() / (found.w.norm() * aim.norm()))])
    generator = torch.Generator().manual_seed(5)
    k, q = ((0.2 * torch.randn(6, 2, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2))
    by_k, by_q = torch.autograd.grad(problem.loss(k @ q.T), (k, q))
    length = (by_k.square().sum() + by_q.square().sum()).sqrt()
    truth = (k - 0.1 * by_k / length) @ (q - 0.1 * by_q / length).T
    assert torch.allclose(descend(problem, steps=1, rank=2, init=0.2, seed=5).w, truth)


def test_descent_stops_where_every_token_is_chosen():
    problem = draw_problem()
    for stop in (0.5, 0.1):
        run = descend(problem, stop=stop, lr=1.0)
        before = descend(problem, stop=0.0, lr=1.0, steps=len(run.correlation) - 1)
        assert float(problem.probabilities(run.w).amax(1).min()) > 1 - stop >= float(problem.probabilities(before.w).amax(1).min())
    assert len(descend(problem, steps=7).correlation) == 7
    assert torch.equal(run.selected, problem.probabilities(run.w).argmax(1)) and torch.equal(run.optimal, run.selected == problem.optimal)


def test_the_svm_meets_its_conditions():
    """The margins' multipliers are not negative, and none where the margin is above 1; a loose tolerance stops earlier."""
    problem = draw_problem(4, 5, 8)
    found = svm(problem)
    c = problem.constraints().flatten(1)
    a = torch.linalg.lstsq(c.T, found.w.flatten()[:, None]).solution[:, 0]
    assert found.feasible and found.objective == pytest.approx(float(found.w.norm())) and float(found.margins.min()) > 1 - 1e-6
    assert torch.allclose(found.margins, c @ found.w.flatten()) and float(a.min()) > -1e-4
    assert float((a.clamp_min(0) * (found.margins - 1)).abs().max()) < 1e-4
    rough = svm(problem, tol=0.5)
    assert float((rough.w - found.w).norm()) > 100 * float((svm(problem, tol=1e-7).w - found.w).norm())
    assert not svm(problem, steps=1).feasible
