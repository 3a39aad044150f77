"""What the checks of active-dormant-heads do not hold: bad input, frozen projections, short training of each kind."""

import math

import pytest
import torch

import regard
from regard.interpret.sinks import forced, sink_report
from regard.tasks.backcopy import backcopy
from regard.zoo.analysis.active_dormant_heads import BackcopyModel, Flow, mutual_reinforcement, train_backcopy


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


def test_models_by_hand():
    """Pre-norm blocks with and without norms and MLPs, learned positions, both kinds of weights."""
    for attention, options in (("softmax", {}), ("relu", {"mlp": False}), ("softmax", {"norm": False, "layers": 2})):
        model, ids = BackcopyModel(9, 8, heads=2, attention=attention, length=6, **options).double(), torch.randint(9, (2, 5))

        def normed(layer, x, norm=options.get("norm", True)):
            if not norm:
                return x
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

        x = model.embed.weight[ids] + model.place[:5]
        for block in model.blocks:
            y = normed(block.norm1, x)
            q, k, v = (y @ one.weight.T for one in (block.attention.q, block.attention.k, block.attention.v))
            heads = []
            for h in range(2):
                at = slice(4 * h, 4 * h + 4)
                s = q[..., at] @ k[..., at].mT / 2
                seen = torch.ones(5, 5).tril().bool()
                if attention == "softmax":
                    w = s.masked_fill(~seen, -torch.inf).softmax(-1)
                else:
                    w = s.relu() * seen / torch.arange(1, 6)[:, None]
                heads.append(w @ v[..., at])
            x = x + torch.cat(heads, -1) @ block.attention.out.weight.T
            if options.get("mlp", True):
                h = (normed(block.norm2, x) @ block.mlp[0].weight.T + block.mlp[0].bias).clamp_min(0)
                x = x + h @ block.mlp[2].weight.T + block.mlp[2].bias
        assert torch.allclose(model(ids), normed(model.norm, x) @ model.out.weight.T, atol=1e-10)
        assert len(model.blocks) == options.get("layers", 1) and abs(float(BackcopyModel(9, 64).place.std()) / 0.02 - 1) < 0.05


def test_the_flow_is_that_of_an_ode_solver():
    scipy = pytest.importorskip("scipy.integrate")
    for keys, spread, value, options in (
        (8, 1.0, 1.0, {}),
        (3, 0.5, 2.0, {}),
        (8, 1.0, 1.0, {"learn_value": False}),
        (8, 1.0, 1.0, {"learn_sink": False}),
    ):

        def slope(t, y, n=keys, s=spread, o=options):
            a, b = y
            p = 1 / (1 + n * math.exp(-a))
            return [o.get("learn_sink", True) * p * (1 - p) * ((1 - p) * s**2 - p * b * b), -o.get("learn_value", True) * p * p * b]

        found = mutual_reinforcement(keys, spread, value, end=100.0, kept=5, **options)
        assert found.times == pytest.approx([100 ** (n / 4) for n in range(5)])
        true = scipy.solve_ivp(slope, (0, 100), (0.0, value), t_eval=(*found.times[:-1], 100.0), rtol=1e-9, atol=1e-12).y
        assert found.sink == pytest.approx(true[0].tolist(), abs=0.02)
        for b, exact in zip(found.value, true[1].tolist(), strict=True):
            assert exact < 1e-6 or math.log(b) == pytest.approx(math.log(exact), rel=0.05, abs=0.02)
    flow = Flow((1.0, 10.0, 100.0, 1000.0), (0.0, 5.0, 6.0, 8.0), (1.0,) * 4)
    assert flow.growth == pytest.approx(2 / math.log(10)) and len(mutual_reinforcement(end=10.0).times) == 40
