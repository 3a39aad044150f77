"""Block Transformer: global attention over blocks of tokens below, attention inside one block above (id 182; Ho et al., 2024).

e_b = [x_1; ..; x_Lb], each of D / Lb;  c = decoder(e), causal over blocks;  block b + 1: decoder over [p_1 .. p_r, emb x_1 .. emb x_Lb-1] gives
x_1 .. x_Lb, p = the r parts of W c_b ("prefix"), or over emb of [start, x_1 ..] plus the Lb parts of W c_b ("summation")
Both decoders are GPT-NeoX's. Not built: the strategy "cross_attention", other embedders than the lookup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.cache.rows import cache_argument
from regard.catalog.registry import register
from regard.errors import MissingDependency, RegardError
from regard.nn.images.timm_host import operators


def neox(vocab: int, dim: int, layers: int, heads: int, hidden: int, rotary: float, positions: int, eps: float) -> Any:
    """A stack of GPT-NeoX without its own embedding."""
    operators()  # transformers reads torchvision where it is installed
    try:
        from transformers import GPTNeoXConfig, GPTNeoXModel
    except ImportError as missing:
        raise MissingDependency("BlockTransformerLM needs transformers: pip install 'regard[hf]'") from missing
    sizes: dict[str, Any] = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden}
    rope: Any = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    model: Any = GPTNeoXModel(
        GPTNeoXConfig(vocab_size=vocab, rope_parameters=rope, max_position_embeddings=positions, layer_norm_eps=eps, **sizes)
    )
    model.set_input_embeddings(None)
    return model


@dataclass
class Blocks:
    """What generation keeps. blocks: the cache of the block decoder, an entry a block; mask (B, n): which blocks hold tokens; context (B, D): the
    last block's c; tokens (B, m) of the block at work; local: the token decoder's cache, for this block alone."""

    blocks: Any
    mask: Tensor
    context: Tensor
    tokens: Tensor
    local: Any = None


@register("block-transformer", kind="model")
class BlockTransformerLM(nn.Module):
    """ids (B, L), L a multiple of block_len -> logits (B, L - block_len, vocab) of the tokens of all blocks but the first.

    dim: a multiple of block_len and heads. hidden: None is 4 dim. parts: r, prefix vectors (None: 2 for "prefix", block_len for "summation").
    pad: its rows of the embeddings stand for padding on the left. start: the token that "summation" begins a block with.
    """

    def __init__(
        self,
        vocab: int,
        block_len: int = 4,
        dim: int = 768,
        n_block_layers: int = 6,
        n_token_layers: int = 6,
        heads: int = 12,
        hidden: int | None = None,
        strategy: str = "prefix",
        parts: int | None = None,
        rotary: float = 0.25,
        positions: int = 2048,
        eps: float = 1e-5,
        pad: int = 0,
        start: int = 0,
    ):
        super().__init__()
        if (
            strategy not in ("prefix", "summation")
            or min(vocab, block_len, n_block_layers, n_token_layers) < 1
            or dim % block_len
            or dim % heads
        ):
            raise RegardError(
                f"strategy={strategy!r}, vocab={vocab}, block_len={block_len}, dim={dim}, heads={heads}: expected 'prefix' or 'summation', positive "
                "numbers, and dim a multiple of block_len and heads"
            )
        parts = (2 if strategy == "prefix" else block_len) if parts is None else parts
        if parts < 1 or (strategy == "summation" and parts != block_len) or not 0 <= pad < vocab or not 0 <= start < vocab:
            raise RegardError(
                f"parts={parts}, pad={pad}, start={start}: expected at least 1, block_len={block_len} for summation, and tokens below {vocab}"
            )
        self.vocab, self.block_len, self.strategy, self.parts, self.pad, self.start = vocab, block_len, strategy, parts, pad, start
        hidden = 4 * dim if hidden is None else hidden
        self.embedder = nn.Embedding(vocab, dim // block_len, padding_idx=pad)
        self.block_decoder = neox(vocab, dim, n_block_layers, heads, hidden, rotary, positions, eps)
        self.expand = nn.Linear(dim, parts * dim)
        self.embed = nn.Embedding(vocab, dim)
        self.token_decoder = neox(vocab, dim, n_token_layers, heads, hidden, rotary, positions, eps)
        self.head = nn.Linear(dim, vocab, bias=False)
        for table in (self.embedder, self.embed, self.head):
            nn.init.normal_(table.weight, std=0.02)
        self.embedder.weight.data[pad].zero_()
        nn.init.normal_(self.expand.weight, std=dim**-0.5)
        nn.init.zeros_(self.expand.bias)

    @classmethod
    def from_vanilla(cls, model: Any, block_len: int = 4, **options: Any) -> BlockTransformerLM:
        """From a GPTNeoXForCausalLM: its lower layers decode blocks, its upper half tokens; embedding, last norm and head go to the tokens'. The
        embedder and the expansion start anew."""
        config = getattr(model, "config", None)
        half = getattr(config, "num_hidden_layers", 0) // 2
        if config is None or type(model).__name__ != "GPTNeoXForCausalLM" or half < 1:
            raise RegardError(f"{type(model).__name__} of {2 * half} layers: expected a GPTNeoXForCausalLM of 2 or more")
        sizes = {"heads": config.num_attention_heads, "hidden": config.intermediate_size, "eps": config.layer_norm_eps}
        rotary = config.rope_parameters.get("partial_rotary_factor", 1.0)
        own = cls(
            config.vocab_size,
            block_len,
            config.hidden_size,
            half,
            config.num_hidden_layers - half,
            rotary=rotary,
            positions=config.max_position_embeddings,
            **sizes,
            **options,
        ).to(model.get_output_embeddings().weight)
        for at, layer in enumerate(model.gpt_neox.layers):
            into = own.block_decoder.layers[at] if at < half else own.token_decoder.layers[at - half]
            into.load_state_dict(layer.state_dict())
        own.token_decoder.final_layer_norm.load_state_dict(model.gpt_neox.final_layer_norm.state_dict())
        own.embed.load_state_dict(model.get_input_embeddings().state_dict())
        own.head.load_state_dict(model.get_output_embeddings().state_dict())
        return own

    def in_blocks(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """ids and which blocks hold tokens, (B, nb, Lb) and (B, nb)."""
        if ids.dim() != 2 or ids.shape[1] % self.block_len or not ids.shape[1]:
            raise RegardError(
                f"ids {tuple(ids.shape)}: expected (B, L), L a multiple of block_len={self.block_len}: pad on the left with {self.pad}"
            )
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if mask.shape != ids.shape or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise RegardError(f"mask {tuple(mask.shape)} for ids {tuple(ids.shape)}: expected the same shape, padding on the left")
        ids = torch.where(mask, ids, self.pad)
        return ids.unflatten(1, (-1, self.block_len)), mask.unflatten(1, (-1, self.block_len)).any(-1)

    def contexts(self, blocks: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        """c (B, n, D) of new blocks (B, n, Lb); mask (B, all blocks)."""
        e = self.embedder(blocks).flatten(2)
        extra = {cache_argument(self.block_decoder): cache} if cache is not None else {}
        return self.block_decoder(  # type: ignore[no-any-return]
            inputs_embeds=e, attention_mask=mask.long(), use_cache=cache is not None, **extra
        ).last_hidden_state

    def inside(self, tokens: Tensor, context: Tensor, done: int = 0, cache: Any = None) -> Tensor:
        """Logits (N, m + 1 - done, vocab) behind `done` .. m tokens of a block (N, m), m < Lb, after the block with `context` (N, D)."""
        p = self.expand(context).unflatten(-1, (self.parts, -1))
        if self.strategy == "prefix":
            x = torch.cat((p, self.embed(tokens)), 1) if done == 0 else self.embed(tokens[:, done - 1 :])
        else:
            x = (self.embed(F.pad(tokens, (1, 0), value=self.start)) + p[:, : tokens.shape[1] + 1])[:, done:]
        extra = {cache_argument(self.block_decoder): cache} if cache is not None else {}
        h = self.token_decoder(inputs_embeds=x, use_cache=cache is not None, **extra).last_hidden_state
        return self.head(h[:, self.parts - 1 :] if self.strategy == "prefix" and done == 0 else h)  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask (B, L): which tokens are real, padding on the left. Logits of padding and of the first block with tokens are nobody's."""
        blocks, there = self.in_blocks(ids, mask)
        if blocks.shape[1] < 2:
            return ids.new_zeros(len(ids), 0, self.vocab, dtype=self.head.weight.dtype)
        c = self.contexts(blocks, there)[:, :-1]
        logits = self.inside(blocks[:, 1:, :-1].flatten(0, 1), c.flatten(0, 1))
        return logits.unflatten(0, (len(ids), -1)).flatten(1, 2)

    def loss(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the tokens that stand behind a block with tokens."""
        blocks, there = self.in_blocks(ids, mask)
        asked = (there[:, 1:] & there[:, :-1]).repeat_interleave(self.block_len, 1)
        if not bool(asked.any()):
            raise RegardError(f"ids {tuple(ids.shape)}: expected a row with tokens in two blocks, for those of the first are not predicted")
        return F.cross_entropy(self(ids, mask)[asked], blocks[:, 1:].flatten(1)[asked])

    def aligned(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Texts (B, L) for training with up to block_len - 1 drawn tokens of padding before them, and cut to whole blocks; and their mask."""
        ahead = int(torch.randint(0, self.block_len, (), generator=generator))
        kept = (ids.shape[1] + ahead) // self.block_len * self.block_len - ahead
        padded = F.pad(ids[:, :kept], (ahead, 0), value=self.pad)
        return padded, F.pad(torch.ones_like(ids[:, :kept], dtype=torch.bool), (ahead, 0))

    @torch.no_grad()
    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Blocks:
        """Read a prompt with the block decoder alone; the prompt fills whole blocks."""
        from transformers import DynamicCache

        blocks, there = self.in_blocks(ids, mask)
        if not bool(there[:, -1].all()):
            raise RegardError("mask: expected a token in every row's prompt")
        cache = DynamicCache()
        return Blocks(cache, there, self.contexts(blocks, there, cache)[:, -1], ids[:, :0])

    @torch.no_grad()
    def step(self, state: Blocks) -> Tensor:
        """Logits (B, vocab) of the token to come; `take` it next."""
        from transformers import DynamicCache

        done = state.tokens.shape[1]
        if done == 0:
            state.local = DynamicCache()
        return self.inside(state.tokens, state.context, done, state.local)[:, -1]

    @torch.no_grad()
    def take(self, state: Blocks, token: Tensor) -> None:
        """The next token (B,). A full block goes to the block decoder, and its local cache is gone."""
        state.tokens = torch.cat((state.tokens, token[:, None]), 1)
        if state.tokens.shape[1] == self.block_len:
            state.mask = F.pad(state.mask, (0, 1), value=True)
            state.context = self.contexts(state.tokens[:, None], state.mask, state.blocks)[:, -1]
            state.tokens, state.local = state.tokens[:, :0], None

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        mask: Tensor | None = None,
        do_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Prompts (B, L), padded on the left, of any length -> (B, L + max_new_tokens), greedy or by lot."""
        short = -ids.shape[1] % self.block_len
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        state = self.prefill(F.pad(ids, (short, 0), value=self.pad), F.pad(mask, (short, 0)))
        for _ in range(max_new_tokens):
            logits = self.step(state)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0] if do_sample else logits.argmax(-1)
            self.take(state, token)
            ids = torch.cat((ids, token[:, None]), 1)
        return ids


__all__ = ["BlockTransformerLM"]
