"""A decoder's residual stream turned by an orthogonal matrix: the function stays, outliers of single channels are spread over all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError


def prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def paley(n: int) -> Tensor | None:
    """A Hadamard matrix of order n from quadratic residues (Paley, 1933), or None where neither construction fits."""

    def jacobsthal(q: int) -> Tensor:
        squares = {x * x % q for x in range(1, q)}
        return torch.tensor(
            [[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)], dtype=torch.float64
        )

    if n % 4 == 0 and prime(n - 1):
        s = torch.zeros(n, n, dtype=torch.float64)
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, jacobsthal(n - 1)
        return s + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        m = n // 2
        s = torch.zeros(m, m, dtype=torch.float64)
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1, jacobsthal(m - 1)
        plus, minus = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), torch.tensor([[1.0, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(s, plus) + torch.kron(torch.eye(m, dtype=torch.float64), minus)
    return None


def hadamard(n: int) -> Tensor:
    """A matrix (n, n) of ones and minus ones with H H^T = n I, in float64; RegardError where doubling and Paley's constructions give none."""
    size, doubled = n, torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    while True:
        core = torch.ones(1, 1, dtype=torch.float64) if size == 1 else paley(size)
        if core is not None:
            return torch.kron(doubled, core)
        if size % 2:
            raise RegardError(f"no Hadamard matrix of order {n} is known here; expected rotation='orthogonal', or a matrix")
        size, doubled = size // 2, torch.kron(doubled, step)


def rotation_of(n: int, kind: str | Tensor = "hadamard", generator: torch.Generator | None = None) -> Tensor:
    """(n, n) orthogonal, float64: diag(+-1) H / sqrt(n) with drawn signs; "orthogonal", drawn by QR; "none", the identity; or the matrix itself."""
    if isinstance(kind, Tensor):
        if kind.shape != (n, n) or float((kind.double() @ kind.double().T - torch.eye(n, dtype=torch.float64)).abs().max()) > 1e-5:
            raise RegardError(f"rotation {tuple(kind.shape)}: expected an orthogonal matrix {n, n}")
        return kind.double()
    if kind == "none":
        return torch.eye(n, dtype=torch.float64)
    if kind == "hadamard":
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1
        return signs[:, None] * hadamard(n) / n**0.5
    if kind == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
        return q * r.diagonal().sign()
    raise RegardError(f"rotation={kind!r}; expected 'hadamard', 'orthogonal', 'none', or a matrix")


READERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj")),
)
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def check_decoder(model: Any) -> Any:
    """The decoder of a transformers model whose layers are those of a Llama; RegardError for others."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    wanted = [name for norm, readers in READERS for name in (norm, *readers)] + list(WRITERS)
    have = (
        layers is not None and hasattr(decoder, "norm") and all(name in dict(layer.named_modules()) for layer in layers for name in wanted)
    )
    if not have or len([m for layer in layers or () for m in layer.children() if hasattr(m, "weight")]) != 2 * len(layers or ()):
        raise RegardError(
            f"{type(model).__name__}: expected a decoder of Llama's layers: two RMS norms before attention and before a gated MLP"
        )
    return decoder


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Gains of RMS norms multiplied into the layers that read them, in place; embeddings and output layer are no longer tied."""
    decoder = check_decoder(model)
    untie(model)
    for layer in decoder.layers:
        for norm, readers in READERS:
            fold(layer.get_submodule(norm), [layer.get_submodule(name) for name in readers])
    fold(decoder.norm, [model.get_output_embeddings()])  # type: ignore[operator]


def fold(norm: Any, readers: list[Any]) -> None:
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * norm.weight.double())
    norm.weight.fill_(1.0)


def untie(model: Any) -> None:
    out, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if out.weight is embed.weight:
        out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=out.weight.requires_grad)
    model.config.tie_word_embeddings = False


@torch.no_grad()
def rotate_stream(model: nn.Module, r: Tensor) -> None:
    """Turn the residual stream by r (D, D), in place: E <- E r, readers W <- W r, writers W <- r^T W and b <- r^T b. Norms have been folded."""
    decoder = check_decoder(model)
    for one in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
        one.weight.copy_(one.weight.double() @ r)
    for layer in decoder.layers:
        for name in (name for _, readers in READERS for name in readers):
            one = layer.get_submodule(name)
            one.weight.copy_(one.weight.double() @ r)
        for name in WRITERS:
            one = layer.get_submodule(name)
            one.weight.copy_(r.T @ one.weight.double())
            if one.bias is not None:
                one.bias.copy_(r.T @ one.bias.double())
