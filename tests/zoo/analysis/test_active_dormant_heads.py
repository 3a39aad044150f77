"""What the checks of active-dormant-heads do not hold: bad input, frozen projections, short training of each kind."""

import pytest
import torch

import regard
from regard.interpret.sinks import forced, sink_report
from regard.tasks.backcopy import backcopy
from regard.zoo.analysis.active_dormant_heads import BackcopyModel, mutual_reinforcement, train_backcopy


def test_bad_input_is_refused():
    task, model = backcopy(), BackcopyModel(25, 16, length=8)
    ids = task.draw(2, 8, torch.Generator())[:, :-1]
    for call, message in (
        (lambda: backcopy(torch.rand(3, 4)), "table"),
        (lambda: backcopy(torch.ones(3, 3)), "table"),
        (lambda: backcopy(triggers=0), "triggers"),
        (lambda: BackcopyModel(5, 16, attention="linear"), "attention"),
        (lambda: BackcopyModel(5, 16, frozen=("q",)), "frozen"),
        (lambda: model(torch.zeros(1, 9, dtype=torch.long)), "length=8"),
        (lambda: sink_report(model, ids, torch.zeros(2, 8, dtype=torch.bool)), "all rows or none"),
        (lambda: forced(model, "bos"), "kind"),
        (lambda: mutual_reinforcement(keys=0), "keys"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            call()


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "sgd", "lr": 0.03}, {"layers": 3, "mlp": False, "norm": False}, {"frozen": ("v", "out")}, {"attention": "relu"}],
)
def test_all_arms_train(options):
    task = backcopy()
    options = {"lr": 3e-3, **options}
    model = train_backcopy(task, steps=40, length=16, dim=24, batch=16, **options)
    ids = task.draw(16, 16, torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss) < 3.0 and all((block.mlp is None) == (options.get("mlp") is False) for block in model.blocks)
    if "frozen" in options:
        assert torch.equal(model.blocks[0].attention.v.weight, torch.eye(24)) and torch.equal(
            model.blocks[0].attention.out.weight, torch.eye(24)
        )


def test_the_task_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    backcopy()
    assert torch.equal(before, torch.random.get_rng_state())
