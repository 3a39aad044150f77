"""Bad input and odd sizes of the theory rows."""

import pytest
import torch

import regard
from regard.zoo.analysis.benefits_of_rank import RankedHeads, nearest_points, rank_one_error
from regard.zoo.analysis.fixed_head_size import FixedHeadMHA, low_rank_bottleneck
from regard.zoo.analysis.mha_memorization_capacity import MemoryAttention, capacity, examples, memorise
from regard.zoo.analysis.random_feature_attention import RandomFeatureAttention, RandomFeatureMLP, drawn, sample_complexity_curve, target
from regard.zoo.analysis.superiority_of_softmax import families, softmax_vs_linear, weights


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weights(torch.ones(3), "sigmoid"), "normalizer"),
        (lambda: families(2, 2, True), "n=2"),
        (lambda: families(2, 8, True, a=1.0), "a=1.0"),
        (lambda: RandomFeatureAttention(3, sigma="exp"), "sigma"),
        (lambda: RandomFeatureAttention(3, matrices=torch.ones(2, 3, 3)), "matrices"),
        (lambda: RandomFeatureAttention(3, 4)(torch.ones(2, 4), torch.ones(2, 5, 4)), "d = 3"),
        (lambda: RandomFeatureMLP(3, 4, 5)(torch.ones(2, 3), torch.ones(2, 5, 3)), "expected 15"),
        (lambda: RandomFeatureAttention(3, 4).fit(*drawn("f1", 5, 3, 2), ridge=[0.0]), "ridge"),
        (lambda: target("f4", torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(2)), "f4"),
        (lambda: sample_complexity_curve(RandomFeatureAttention(3, 4), drawn("f1", 5, 3, 2), drawn("f1", 5, 3, 2), [6]), "sizes"),
        (lambda: examples(3, 4, contexts="same"), "contexts"),
        (lambda: examples(3, 9, contexts="permuted", bag=8), "bag"),
        (lambda: MemoryAttention(weights="relu"), "weights"),
        (lambda: MemoryAttention(4, 2, value_dim=2).solve(torch.ones(2, 4), torch.ones(2, 3, 4), torch.ones(2)), "value_dim=1"),
        (lambda: FixedHeadMHA(8, 2, 0), "head_size"),
        (lambda: low_rank_bottleneck(torch.randn(4, 8), torch.eye(4), 4), "positive"),
        (lambda: low_rank_bottleneck(torch.ones(4, 8), torch.full((4, 4), 0.25), 4), "rank below"),
        (lambda: nearest_points(2, 4, 5, geometry="orthonormal"), "orthonormal"),
        (lambda: nearest_points(2, 4, 5, geometry="doubled"), "even"),
        (lambda: RankedHeads(4, 0, 1), "rank=0"),
        (lambda: rank_one_error(torch.ones(2, 3), torch.ones(2, 3)), r"\(H, 2\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_results_plot_and_print():
    assert "<svg" in softmax_vs_linear((8, 16), draws=4).plot()
    assert "<svg" in sample_complexity_curve(RandomFeatureAttention(3, 4), drawn("f1", 20, 3, 2), drawn("f1", 5, 3, 2), [10, 20]).plot()


def test_numbers_are_memorised_and_capacity_is_the_theorem_s():
    queries, contexts = examples(12, 6, 8)
    found = memorise(queries, contexts, torch.rand(12), heads=6, classes=None, steps=300, lr=1e-2, close=0.1)
    assert found.count == 12 and found.saturated.shape == (6,) and len(found.loss) == 300
    assert capacity([3, 7, 8, 12], 4, 6, 2) == 7


def test_biased_samples_differ_and_seeds_repeat():
    first, again, other = (RandomFeatureAttention(4, 6, bias=b, seed=s).matrices for b, s in ((1.0, 0), (1.0, 0), (0.0, 0)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_vocabularies_that_cannot_be_told_apart_are_refused():
    from regard.zoo.analysis.rank_one_universal import RankOneAttention, telling

    with pytest.raises(regard.RegardError, match="one token twice"):
        telling(torch.ones(3, 4))
    with pytest.raises(regard.RegardError, match="direction"):
        RankOneAttention(4, torch.ones(3))


def test_regressions_and_margins_refuse_bad_shapes():
    from regard.zoo.analysis.attention_svm import AttentionProblem, descend, draw_problem, nuclear_svm
    from regard.zoo.analysis.icl_softmax_regression import SoftmaxRegression, attention_prediction

    problem = draw_problem()
    for call, message in (
        (lambda: SoftmaxRegression(torch.ones(3, 2), torch.ones(2)), "expected"),
        (lambda: attention_prediction(torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), 0.0), "beta"),
        (lambda: AttentionProblem(problem.tokens, problem.z[:, :2], problem.labels, problem.v), "expected"),
        (lambda: problem.constraints(torch.tensor([0, 1, 9])), "chosen"),
        (lambda: descend(problem, rank=2), "saddle"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    assert nuclear_svm(problem, rank=3, starts=2).feasible and "<svg" in descend(problem, steps=3).plot()


def test_prompts_and_scans_refuse_bad_sizes():
    from regard.zoo.analysis.icl_linear_regression import RegressionHeads, head_pattern, planted_heads, regression_prompts
    from regard.zoo.analysis.scan_snap import scan_and_snap, scan_data

    for call, message in (
        (lambda: regression_prompts(2, rho=1.0), "rho"),
        (lambda: RegressionHeads(normalizer="relu"), "normalizer"),
        (lambda: planted_heads(torch.ones(2), torch.ones(3), 4), "omega"),
        (lambda: head_pattern(RegressionHeads(4, 2, tasks=2)), "2 tasks"),
        (lambda: scan_data(low=0.0), "low"),
        (lambda: scan_and_snap(scan_data(), length=1), "length"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    x = regression_prompts(20_000, 1, 3, rho=0.5, generator=torch.Generator().manual_seed(0))[2]
    torch.testing.assert_close(x.T @ x / len(x), 0.5 ** (torch.arange(3)[:, None] - torch.arange(3)).abs().float(), rtol=0.05, atol=0.05)
    assert "<svg" in scan_and_snap(scan_data(), length=8, steps=4, batch=4, every=2).plot()


def test_penalties_refuse_bad_shapes_and_hold_at_the_edge():
    from regard.zoo.analysis.deceptive_attention import BiLSTMAttention, EmbAttention, Translator, attention_penalty, translation

    a = torch.tensor([[0.0, 1.0]], requires_grad=True)
    penalty = attention_penalty(a, torch.tensor([[0, 1]]), 1.0)  # all on what it must not see
    assert bool(penalty.isfinite()) and float(attention_penalty(a, torch.tensor([[0, 0]]), 1.0)) == pytest.approx(0, abs=1e-9)
    for call, message in (
        (lambda: attention_penalty(a, torch.ones(1, 3), 1.0), "expected"),
        (lambda: attention_penalty(a, torch.ones(1, 2), 1.0, "sum"), "reduce"),
        (lambda: attention_penalty(a, torch.ones(1, 2), -1.0), "lam"),
        (lambda: Translator(5, attention="hard"), "attention"),
        (lambda: translation("sort", 1, 4, 5, torch.Generator()), "kind"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()
    for model in (EmbAttention(9, 8).eval(), BiLSTMAttention(9, 8, 4).eval()):
        logits, alpha = model(torch.tensor([[3, 4, 0, 0], [0, 0, 0, 0]]))
        assert bool(logits.isfinite().all()) and not alpha[0, 2:].any() and not alpha[1].any()
    source, target, _ = translation("copy", 2, 4, 5, torch.Generator())
    assert float(Translator(5, 8, "uniform")(source, target)[1].std()) < 1e-6
