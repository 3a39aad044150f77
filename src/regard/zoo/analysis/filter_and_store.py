"""Filter and store: one layer of attention and an MLP that learns facts and gives them back when asked (id 199; 2025).

A statement is [filler, s, filler, r] -> a(s), r one of the M paraphrases of subject s; a question has the token q in r's place.
w = softmax(h_T^T W_KQ h / sqrt(d)),  z = sum_t w_t V h_t,  logits = W_2 relu(W_1 z + b_1) + b_2,  h = E[x],  W_KQ = 0 at the start.
Attention comes to filter (weight leaves the fillers), the MLP to store s -> a. Fine-tuned on questions about a share rho of the subjects, the model
answers those about the others where rho and M are large, and errs where they are small.

Not built: schedules of the learning rate; PopQA on pretrained models. That attention alone must fail is not reproduced: with a readout that
trains it answers too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regard.catalog.registry import register
from regard.errors import RegardError
from regard.plots import Plot, figure
from regard.results import Result
from regard.tasks.facts import Facts
from regard.tasks.training import fit


class FilterStore(nn.Module):
    """ids (B, T) -> next-token logits (B, vocab), read at the last token; one head, no positions, no residual, no norm. readout: "mlp", or
    attention alone: "linear" (logits = W z + b), or "frozen" (the same, W and b as drawn). std: of E's entries."""

    def __init__(self, vocab: int, dim: int = 64, hidden: int = 256, readout: str = "mlp", std: float = 1.0):
        super().__init__()
        if readout not in ("mlp", "linear", "frozen") or min(vocab, dim, hidden) < 1:
            raise RegardError(
                f"readout={readout!r}, vocab={vocab}, dim={dim}, hidden={hidden}; expected mlp, linear or frozen, and positive sizes"
            )
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=std)
        self.kq, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.kq.weight)
        mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, vocab))
        self.readout: nn.Module = mlp if readout == "mlp" else nn.Linear(dim, vocab).requires_grad_(readout == "linear")

    def weights(self, ids: Tensor) -> Tensor:
        """What the last token gives to each, (B, T)."""
        return self.attend(ids)[1]

    def attend(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(z (B, dim), w (B, T))."""
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise RegardError(f"ids {tuple(ids.shape)}; expected (B, T) with a token or more")
        h = self.embed(ids)
        w = ((self.kq(h) @ h[:, -1, :, None])[..., 0] * h.shape[-1] ** -0.5).softmax(-1)
        return self.value((w[:, None] @ h)[:, 0]), w

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(self.attend(ids)[0])  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """A frozen matrix W and the B A of rank r that is learnt beside it; B = 0 at the start, A as a linear layer's weight."""

    def __init__(self, out: int, inner: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.empty(rank, inner)), nn.Parameter(torch.zeros(out, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def low_rank(model: FilterStore, rank: int) -> None:
    """From now on only W + B A of attention's and the readout's matrices learn, where W did: everything else is held."""
    if rank < 1:
        raise RegardError(f"rank={rank}; expected 1 or more")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    model.requires_grad_(False)
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.out_features, layer.in_features, rank).to(layer.weight))


@dataclass(frozen=True)
class Acquired(Result):
    """pretrain, finetune: losses by step. loss: mean over the statements when pretraining ends. seen, unseen: shares of questions answered, about
    subjects of the fine-tuning and the others. filler, subject, relation: mean attention of a statement's last token on each filler, the subject
    and the relation, by `steps` of pretraining."""

    model: FilterStore
    facts: Facts
    pretrain: list[float]
    finetune: list[float]
    loss: float
    seen: float
    unseen: float
    steps: list[int] = field(default_factory=list)
    filler: list[float] = field(default_factory=list)
    subject: list[float] = field(default_factory=list)
    relation: list[float] = field(default_factory=list)

    def plot(self) -> Plot:
        """Attention by step of pretraining."""
        names = ("filler", "subject", "relation")
        lines = {n: [(float(s), v) for s, v in zip(self.steps, getattr(self, n), strict=True)] for n in names}
        return figure("Filter and store", "step", "attention", lines)


@register("filter-and-store", kind="experiment")
def acquire(
    facts: Facts,
    share: float = 0.5,
    *,
    dim: int = 64,
    hidden: int = 256,
    readout: str = "mlp",
    std: float = 1.0,
    rank: int | None = None,
    steps: tuple[int, int] = (800, 400),
    lr: tuple[float, float] = (2e-3, 1e-3),
    batch: int = 128,
    leak: float = 0.0,
    every: int = 100,
    seed: int = 0,
    start: Acquired | None = None,
) -> Acquired:
    """Pretrain on statements, fine-tune on questions about a `share` (rho) of the subjects, and ask about the others; steps and lr (Adam) of the
    two stages. rank: of low-rank fine-tuning (None: every parameter). leak: the share of questions within pretraining (0: none).
    start: an earlier result on the same facts, whose pretraining is taken over in place of one; its model must not have been fine-tuned
    (steps[1] = 0), and is left as it is."""
    asked = round(share * facts.subjects)
    if not 0 < asked < facts.subjects or not 0 <= leak <= 1 or min(batch, every) < 1:
        raise RegardError(
            f"share={share}, leak={leak}, batch={batch}, every={every}; expected a share that leaves 1 to {facts.subjects - 1} subjects to ask "
            "about, a leak from 0 to 1 and positive numbers"
        )
    if start is not None and (start.facts is not facts or start.finetune):
        raise RegardError("start: expected a result on these very facts, made with steps=(n, 0): without fine-tuning")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FilterStore(facts.vocab, dim, hidden, readout, std) if start is None else copy.deepcopy(start.model)
        found = Acquired(model, facts, [], [], 0.0, 0.0, 0.0) if start is None else start
        subject = torch.arange(facts.subjects).repeat_interleave(facts.phrases.shape[1])
        told = facts.sequences(subject, facts.subjects + facts.phrases.flatten(), torch.Generator().manual_seed(seed + 1))

        def objective(pair: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model(pair[0]), pair[1])

        @torch.no_grad()
        def look(step: int) -> None:
            if step % every == 0 or step == steps[0]:
                w = model.weights(told[0]).mean(0).tolist()
                for kept, value in ((found.steps, step), (found.filler, (w[0] + w[2]) / 2), (found.subject, w[1]), (found.relation, w[3])):
                    kept.append(value)  # type: ignore[attr-defined]

        pretrain, loss = found.pretrain, found.loss
        if start is None:
            pretrain = fit(model, lambda g: facts.statements(batch, g, leak), objective, steps[0], lr=lr[0], seed=seed, watch=look)
            with torch.no_grad():
                loss = objective(told).item()
        if rank is not None:
            low_rank(model, rank)
        own, others = facts.order[:asked], facts.order[asked:]

        def ask(generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return facts.questions(own[torch.randint(asked, (batch,), generator=generator)], generator)

        finetune = fit(model, ask, objective, steps[1], lr=lr[1], seed=seed + 2)
    return Acquired(
        model, facts, pretrain, finetune, loss, extraction(model, facts, own), extraction(model, facts, others),
        found.steps, found.filler, found.subject, found.relation,
    )  # fmt: skip


@torch.no_grad()
def extraction(model: FilterStore, facts: Facts, subject: Tensor, each: int = 8, seed: int = 0) -> float:
    """The share of `each` questions, with other fillers, about every one of subject (n,) that are answered."""
    ids, answer = facts.questions(subject.repeat(each), torch.Generator().manual_seed(seed))
    return float((model(ids).argmax(-1) == answer).double().mean())
