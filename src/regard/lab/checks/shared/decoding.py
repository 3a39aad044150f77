"""Small decoders for checks of drafting strategies, and what is measured on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.generate import Draft, Host, Strategy, generate


def llama(
    vocab: int = 50, layers: int = 2, dim: int = 32, heads: int = 4, kv_heads: int = 2, length: int = 1024, sharp: float = 1.0
) -> Any:
    """A random Llama in float64; sharp scales its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": dim, "intermediate_size": 2 * dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        **sizes,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)
    model.lm_head.weight.data.mul_(sharp)
    return model.double().eval()


def bigrams(vocab: int = 200, period: int = 97, noise: float = 0.3) -> Any:
    """A language model without attention: logits are a table of bigrams and noise that depends on the position modulo `period`."""
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Bigrams(PreTrainedModel):  # type: ignore[misc, no-any-unimported]
        def __init__(self) -> None:
            super().__init__(PretrainedConfig(vocab_size=vocab))
            self.table, self.head = nn.Embedding(vocab, vocab), nn.Linear(vocab, vocab, bias=False)
            self.table.weight.data, self.head.weight.data = torch.randn(vocab, vocab), torch.eye(vocab)
            self.noise = noise * torch.randn(period, vocab)
            self.config._attn_implementation = "sdpa"

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
            kept = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
            past_key_values.update(kept, kept, 0)
            return CausalLMOutputWithPast(logits=self.head(self.table(input_ids) + self.noise[position_ids % len(self.noise)]))

    return Bigrams().eval()


@torch.no_grad()
def continued(model: Any, ids: Tensor, count: int) -> Tensor:
    """Greedy decoding by the book: the whole text is read again for each token; the stub's logits need no text before the last token."""
    if hasattr(model, "noise"):
        for _ in range(count):
            logits = model.table.weight[ids[:, -1]] + model.noise[(ids.shape[1] - 1) % len(model.noise)]
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
        return ids
    for _ in range(count):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def wrong(model: Any, ids: Tensor, strategy: Strategy, truth: Tensor, **options: Any) -> float:
    """The share of new tokens that are not those of plain greedy decoding."""
    out = generate(model, ids, strategy, max_new_tokens=truth.shape[1] - ids.shape[1], ends=(), **options).tokens
    return float((out != truth).float().mean())


def accept_blindly(draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A rule that verifies nothing: the first child of the root stays."""
    node = torch.ones_like(draft.tokens[:, 0]) if draft.tokens.shape[1] > 1 else torch.zeros_like(draft.tokens[:, 0])
    return node, logits.gather(1, node[:, None, None].expand(-1, 1, logits.shape[-1]))[:, 0].argmax(-1)


@torch.no_grad()
def tree_gap(model: Any, ids: Tensor, draft: Draft, flat: bool = False) -> float:
    """Largest gap between a tree's logits and those of each node's path read as plain text. flat: positions as if siblings stood in a row."""
    host = Host(model)
    host.read(ids[:, :-1], torch.ones_like(ids[:, :-1], dtype=torch.bool))
    if flat:
        draft.depths = torch.arange(draft.tokens.shape[1])[None]
    logits, worst = host.verify(draft).logits, 0.0
    parents = draft.parents.expand_as(draft.tokens)
    for row in range(len(ids)):
        for node in range(draft.tokens.shape[1]):
            words, at = [int(draft.tokens[row, node])], node
            while at:
                at = int(parents[row, at])
                words.append(int(draft.tokens[row, at]))
            text = torch.cat((ids[row, :-1], torch.tensor(words[::-1])))[None]
            worst = max(worst, float((model(text, use_cache=False).logits[0, -1] - logits[row, node]).abs().max()))
    return worst


def taught(model: Any, texts: Callable[[], Tensor], steps: int, lr: float = 3e-3) -> Any:
    """A transformers decoder after some steps of next-token training; texts() draws a batch (B, L)."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(steps):
        ids = texts()
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)
