"""Filter and store: what the checks cannot hold."""

import copy

import pytest
import torch

import regard
from regard.lab.experiments import acquire
from regard.tasks.facts import Facts
from regard.zoo.analysis.filter_and_store import FilterStore, extraction, low_rank

SMALL = {"dim": 8, "hidden": 6, "batch": 8, "every": 2}


def small() -> Facts:
    return Facts(6, 3, 4, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Facts(multiplicity=25), "multiplicity=25"),
        (lambda: Facts(fillers=0), "fillers=0"),
        (lambda: Facts(3, 2, answer=torch.tensor([0, 1, 2])), "answer"),
        (lambda: Facts(3, 2, answer=torch.tensor([0.0, 1.0, 1.0])), "float32"),
        (lambda: Facts(2, 2, 4, 1, 1, phrases=torch.zeros(2, 2).long()), "phrases"),
        (lambda: FilterStore(5, readout="relu"), "readout"),
        (lambda: FilterStore(5)(torch.zeros(3).long()), "ids"),
        (lambda: FilterStore(5)(torch.zeros(3, 0).long()), "ids"),
        (lambda: low_rank(FilterStore(5), 0), "rank=0"),
        (lambda: acquire(small(), 0.0, **SMALL), "share=0.0"),
        (lambda: acquire(small(), 1.0, **SMALL), "share=1.0"),
        (lambda: acquire(small(), leak=1.5, **SMALL), "leak=1.5"),
        (lambda: acquire(small(), start=acquire(small(), steps=(1, 0), **SMALL), **SMALL), "start"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(regard.RegardError, match=message):
        call()


def test_given_facts_are_kept_and_a_drawn_corpus_repeats():
    answer, phrases = torch.tensor([1, 0]), torch.tensor([[2], [3]])
    facts = Facts(2, 2, 4, 1, 1, answer=answer, phrases=phrases)
    ids, a = facts.statements(9, torch.Generator().manual_seed(0))
    assert torch.equal(ids[:, 3], 2 + phrases[ids[:, 1], 0]) and torch.equal(a, 8 + answer[ids[:, 1]])
    assert torch.equal(small().phrases, small().phrases) and not torch.equal(Facts(seed=0).answer, Facts(seed=1).answer)
    assert all(len(set(row)) == 2 for row in small().phrases.tolist())


def test_attention_alone_reads_out_by_a_matrix_that_learns_or_not():
    for readout, moves in (("linear", True), ("frozen", False)):
        start = acquire(small(), readout=readout, steps=(0, 0), **SMALL).model
        end = acquire(small(), readout=readout, steps=(5, 5), rank=2, **SMALL).model
        assert isinstance(end.readout, torch.nn.Linear)
        assert torch.equal(start.readout.weight, end.readout.weight) != moves
        assert not torch.equal(start.value.weight, end.value.weight)


def test_a_start_is_taken_over_and_left_as_it_is():
    facts = small()
    start = acquire(facts, steps=(4, 0), **SMALL)
    kept = copy.deepcopy(start.model.state_dict())
    end, whole = acquire(facts, steps=(0, 3), start=start, **SMALL), acquire(facts, steps=(4, 3), **SMALL)
    assert all(torch.equal(kept[k], v) for k, v in start.model.state_dict().items())
    assert torch.allclose(end.model.kq.weight, whole.model.kq.weight) and end.finetune == pytest.approx(whole.finetune)
    assert end.pretrain == start.pretrain and end.loss == start.loss and end.steps == [0, 2, 4] and len(end.finetune) == 3
    assert "<svg" in end.plot()


def test_first_weights_are_even_and_initial_values_as_asked_for():
    model = FilterStore(500, 40, std=0.1)
    assert torch.equal(model.weights(torch.zeros(1, 4).long()), torch.full((1, 4), 0.25))
    assert float(model.embed.weight.std()) == pytest.approx(0.1, rel=0.05)
    assert float(FilterStore(500, 40).embed.weight.std()) == pytest.approx(1.0, rel=0.05)
    assert model.readout[0].weight.shape == (256, 40)


def test_extraction_counts_right_answers():
    class Oracle(torch.nn.Module):
        def forward(self, ids):
            right = facts.first_answer + torch.where(ids[:, 1] < 3, facts.answer[ids[:, 1]], facts.answer[ids[:, 1]] + 1)
            return torch.nn.functional.one_hot(right, facts.vocab + 1).float()

    facts = small()
    assert extraction(Oracle(), facts, torch.arange(6)) == 0.5


def test_the_net_by_hand():
    ids = torch.randint(9, (3, 5))
    for readout in ("mlp", "linear", "frozen"):
        model = FilterStore(9, 4, 6, readout).double()
        model.kq.weight.data.normal_()
        h = model.embed.weight[ids]
        s = torch.einsum("btd,bd->bt", h @ model.kq.weight.T, h[:, -1]) / 2
        z = (s.softmax(1)[..., None] * h).sum(1) @ model.value.weight.T
        if readout == "mlp":
            z = (z @ model.readout[0].weight.T + model.readout[0].bias).clamp_min(0)
        last = model.readout[2] if readout == "mlp" else model.readout
        assert torch.allclose(model(ids), z @ last.weight.T + last.bias) and torch.allclose(model.weights(ids), s.softmax(1))


def test_what_learns_at_low_rank():
    model = FilterStore(9, 4, 6, "mlp")
    before, ids = model(torch.arange(9)[:, None]), torch.randint(9, (3, 5))
    low_rank(model, 2)
    assert torch.equal(model(torch.arange(9)[:, None]), before)
    learned = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 8 and all("parametrizations.weight" in name for name in learned)
    for layer, (out, inner) in ((model.kq, (4, 4)), (model.readout[0], (6, 4)), (model.readout[2], (9, 6))):
        part = layer.parametrizations.weight[0]
        assert part.up.shape == (out, 2) and part.down.shape == (2, inner) and not part.up.any()
        bound = (1 / inner) ** 0.5
        assert 0 < float(part.down.abs().max()) <= bound
    model.value.parametrizations.weight[0].up.data.normal_()
    part = model.value.parametrizations.weight[0]
    assert torch.allclose(model.value.weight, model.value.parametrizations.weight.original + part.up @ part.down)
    model(ids).sum().backward()
    assert model.readout[2].parametrizations.weight.original.grad is None
    wide = FilterStore(9, 4, 6).to("meta", torch.float64)
    low_rank(wide, 2)
    assert all(p.is_meta and p.dtype == torch.float64 for p in wide.parameters())
    held = FilterStore(9, 4, 6, "frozen")
    low_rank(held, 1)
    assert not hasattr(held.readout, "parametrizations")


def test_questions_are_asked_each_so_often_with_other_fillers():
    seen, facts = [], small()

    class Counter(torch.nn.Module):
        def forward(self, ids):
            seen.append(ids)
            return torch.zeros(len(ids), facts.vocab)

    subjects = torch.tensor([1, 4])
    extraction(Counter(), facts, subjects)
    extraction(Counter(), facts, subjects, each=3, seed=5)
    extraction(Counter(), facts, subjects, each=3, seed=6)
    assert [len(ids) for ids in seen] == [16, 6, 6] and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[1], facts.questions(subjects.repeat(3), torch.Generator().manual_seed(5))[0])


@pytest.mark.parametrize(("rank", "leak"), [(None, 0.3), (2, 0.0)])
def test_a_run_by_its_recipe(rank, leak):
    """Adam on statements, then on questions about the first of the order; attention of all statements is looked at before steps."""
    facts, state = small(), torch.get_rng_state()
    options = {"dim": 8, "hidden": 6, "batch": 8, "every": 3, "steps": (4, 3), "lr": (0.05, 0.02), "std": 0.5, "seed": 7}
    found = acquire(facts, 0.5, rank=rank, leak=leak, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    model = FilterStore(facts.vocab, 8, 6, "mlp", 0.5)
    pairs = [(s, 6 + int(phrase)) for s in range(6) for phrase in facts.phrases[s]]
    told, truth = facts.sequences(*torch.tensor(pairs).T, torch.Generator().manual_seed(8))
    looks, losses = [], ([], [])

    def look(step):
        w = model.weights(told).detach().mean(0)
        looks.append((step, float(w[[0, 2]].mean()), float(w[1]), float(w[3])))

    def learn(batches, lr, into, watched):
        optimiser = torch.optim.Adam(model.parameters(), lr)
        for step, (ids, answer) in enumerate(batches):
            if watched and step % 3 == 0:
                look(step)
            loss = -model(ids).log_softmax(-1).gather(1, answer[:, None]).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            into.append(float(loss))

    generator = torch.Generator().manual_seed(7)
    learn((facts.statements(8, generator, leak) for _ in range(4)), 0.05, losses[0], True)
    look(4)
    loss = -float(model(told).detach().log_softmax(-1).gather(1, truth[:, None]).mean())
    if rank is not None:
        low_rank(model, rank)
    generator = torch.Generator().manual_seed(9)
    own = facts.order[:3]
    learn((facts.questions(own[torch.randint(3, (8,), generator=generator)], generator) for _ in range(3)), 0.02, losses[1], False)
    assert found.pretrain == pytest.approx(losses[0], rel=1e-5) and found.loss == pytest.approx(loss, rel=1e-5)
    assert [step for step, *_ in looks] == found.steps == [0, 3, 4]
    for name, values in zip(("filler", "subject", "relation"), list(zip(*looks, strict=True))[1:], strict=True):
        assert getattr(found, name) == pytest.approx(values, rel=1e-4)
    assert found.seen == extraction(model, facts, own) and found.unseen == extraction(model, facts, facts.order[3:])
    assert found.finetune == pytest.approx(losses[1], rel=1e-5) and found.facts is facts
