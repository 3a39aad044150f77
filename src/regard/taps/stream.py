"""The residual stream of a block: which of its modules hold what, by the names that model families use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegardError

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "proj", "to_out", "out", "o")
MLPS = (
    "mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "fc2",
    "layer.1.DenseReluDense", "layer.2.DenseReluDense", "output.dense",
)  # fmt: skip


@dataclass(frozen=True)
class Mid:
    """The stream between attention and MLP. after: it is the output of this module (norms behind the sum). branch: it is the block's
    input plus this module's output, and what `reader` reads. With all three: the first where `after` runs behind `branch`, else the
    second (BART and mBART have the same names)."""

    after: str | None = None
    branch: str | None = None
    reader: str | None = None


# (modules that a block must have, where its middle is), the first that fits; {attn} is the attention's own name in the block.
MIDS = (
    (("pre_feedforward_layernorm",), Mid(branch="post_attention_layernorm", reader="pre_feedforward_layernorm")),  # Gemma
    (("post_feedforward_layernorm", "post_attention_layernorm"), Mid(branch="post_attention_layernorm", reader="mlp")),  # OLMo 2
    (("self_attn_layer_norm", "fc1", "encoder_attn_layer_norm"), Mid("{attn}_layer_norm", "{attn}", "encoder_attn_layer_norm")),  # BART
    (("self_attn_layer_norm", "fc1"), Mid("self_attn_layer_norm", "self_attn", "final_layer_norm")),  # BART's encoder, OPT
    (("attention.output.LayerNorm",), Mid(after="attention.output")),  # BERT
    (("layer.1.DenseReluDense",), Mid(after="layer.0")),  # T5
    (("layer.2.DenseReluDense",), Mid(after="{attn}")),
    (("drop_path1", "norm2"), Mid(branch="drop_path1", reader="norm2")),  # timm
    (("scale1", "norm2"), Mid(branch="scale1", reader="norm2")),  # regard's own
    *(
        ((reader,), Mid(branch="{attn}", reader=reader))
        for reader in ("post_attention_layernorm", "ln_2", "layernorm_after", "layer_norm2", "mlp_norm", "norm2")
    ),
)


def child(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if not isinstance(module, nn.Module):
            return None
    return module


def first_child(module: nn.Module, paths: Sequence[str]) -> nn.Module | None:
    return next((found for path in paths for found in [child(module, path)] if found is not None), None)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def block_of(model: nn.Module, attention: str) -> tuple[str, nn.Module] | None:
    """(name, module) of the block that holds the attention module of this name: the nearest numbered one that has an MLP, or, in models
    of attention alone, the nearest numbered one."""
    parts = attention.split(".")
    around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1) if parts[end - 1].isdigit()]
    found = [(name, model.get_submodule(name)) for name in around]
    return next((pair for pair in found if first_child(pair[1], MLPS) is not None), found[0] if found else None)


def projection_of(model: nn.Module, attention: str) -> nn.Module | None:
    """The layer that mixes the heads: (B, L, H Dv) -> (B, L, dim)."""
    own = first_child(model.get_submodule(attention), PROJECTIONS)
    if own is not None:
        return own
    outside = model.get_submodule(attention.rpartition(".")[0])
    return child(outside, "output.dense")


def mid_of(block: nn.Module, attention: str) -> Mid | None:
    """attention: the name of the attention module in the block."""
    for needed, mid in MIDS:
        if all(child(block, path) is not None for path in needed):
            name = attention.rpartition(".")[0] if attention.endswith(("Attention", ".self")) else attention
            named = {key: path and path.format(attn=name) for key, path in vars(mid).items()}
            if all(path is None or child(block, path) is not None for path in named.values()):
                return Mid(**named)
    return None


Through = Callable[[str, Tensor], Tensor]


class Hook:
    """A hook of one module, which a copy of it leaves alone."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]):
        self.module, self.run = module, run

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return self

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return self.run(*args) if module is self.module else None


def on_input(module: nn.Module, see: Callable[[Tensor], Tensor]) -> Any:
    """`see` the hidden states that come to a module, and what it gives instead of them."""

    def run(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (see(args[0]), *args[1:]), options
        name = next((key for key in ("hidden_states", "x", "input") if isinstance(options.get(key), Tensor)), None)
        if name is None:
            raise RegardError(f"{type(module).__name__} is called without hidden states; expected other points than the residual stream")
        return args, {**options, name: see(options[name])}

    return module.register_forward_pre_hook(Hook(module, run), with_kwargs=True)


def on_output(module: nn.Module, see: Callable[[Tensor], Tensor]) -> Any:
    """`see` a module's output (the first of several)."""

    def run(args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return see(output)
        if isinstance(output, (tuple, list)) and isinstance(output[0], Tensor):
            return type(output)((see(output[0]), *output[1:]))
        raise RegardError(f"{type(module).__name__} gives a {type(output).__name__}; expected other points than the residual stream")

    return module.register_forward_hook(Hook(module, run))


@dataclass(frozen=True)
class Stream:
    """The modules around one attention layer. block, projection, mlp, mid: None where they are not known by name."""

    block: nn.Module | None
    projection: nn.Module | None
    mlp: nn.Module | None
    mid: Mid | None
    name: str

    def missing(self, point: str) -> bool:
        needed = {"out": self.projection, "mlp": self.mlp, "residual_mid": self.mid}.get(point, self.block)
        return needed is None

    def hook(self, point: str, through: Through) -> list[Any]:
        """Hooks that pass the point through; the module's own tensors where nothing changes them."""
        if point == "out":
            return [on_output(self.known(self.projection), lambda x: through("out", x))]
        block = self.known(self.block)
        if point == "mlp":
            return self.fed(block, through)
        if point == "residual_in":
            return [on_input(block, lambda x: through("residual_in", x))]
        if point == "residual_out":
            return [on_output(block, lambda x: through("residual_out", x))]
        mid = self.mid
        assert mid is not None
        if mid.after is not None and mid.branch is None:
            return [on_output(self.known(child(block, mid.after)), lambda x: through("residual_mid", x))]
        return self.summed(block, mid, through)

    def fed(self, block: nn.Module, through: Through) -> list[Any]:
        """The MLP's output as (B, L, dim), also where its tokens stand in one row."""
        shape: list[torch.Size] = []

        def begin(x: Tensor) -> Tensor:
            shape[:] = [x.shape]
            return x

        def see(y: Tensor) -> Tensor:
            flat = y.dim() == 2 and len(shape[0]) == 3
            new = through("mlp", y.view(shape[0]) if flat else y)
            return new.reshape(y.shape) if flat else new

        return [on_input(block, begin), on_output(self.known(self.mlp), see)]

    def summed(self, block: nn.Module, mid: Mid, through: Through) -> list[Any]:
        """The middle as input plus branch: an edit goes into the branch, and what the next norm reads must be that sum."""
        assert mid.branch is not None and mid.reader is not None
        now: dict[str, Tensor] = {}
        behind = mid.after is not None  # unless it turns out to run before the branch

        def begin(x: Tensor) -> Tensor:
            nonlocal behind
            now["in"], behind = x, mid.after is not None
            return x

        def normed(x: Tensor) -> Tensor:
            nonlocal behind
            if "branch" in now:
                return through("residual_mid", x)
            behind = False
            return x

        def middle(y: Tensor) -> Tensor:
            if behind:
                now["branch"] = y
                return y
            if now["in"].shape != y.shape:
                raise self.not_a_sum(block)
            whole = now["in"] + y
            new = through("residual_mid", whole)
            now["mid"] = new
            return y if new is whole else y + (new - whole)

        def compare(x: Tensor) -> Tensor:
            if "mid" not in now:
                return x
            slack = 1e-2 if x.dtype in (torch.float16, torch.bfloat16) else 1e-4
            if x.numel() != now["mid"].numel() or not torch.allclose(x, now["mid"].to(x.dtype).view(x.shape), slack, slack):
                raise self.not_a_sum(block)
            now.clear()
            return x

        branch, reader = self.known(child(block, mid.branch)), self.known(child(block, mid.reader))
        after = [] if mid.after is None else [on_output(self.known(child(block, mid.after)), normed)]
        return [on_input(block, begin), on_output(branch, middle), *after, on_input(reader, compare)]

    def not_a_sum(self, block: nn.Module) -> RegardError:
        return RegardError(
            f"the residual stream of {type(block).__name__} in {self.name} is not its input plus attention (parallel branches, windows, "
            "scales, or dropout in training); expected the points residual_in and residual_out, or model.eval()"
        )

    @staticmethod
    def known(module: nn.Module | None) -> nn.Module:
        assert module is not None
        return module


def stream_of(model: nn.Module, attention: str) -> Stream:
    found = block_of(model, attention)
    if found is None:
        return Stream(None, projection_of(model, attention), None, None, attention)
    name, block = found
    inner = attention.removeprefix(name + ".")
    return Stream(block, projection_of(model, attention), first_child(block, MLPS), mid_of(block, inner), attention)
