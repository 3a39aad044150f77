"""A language model that looks far back over blocks of four bytes alone, and inside one block at bytes: python examples/blocks_of_tokens.py [STEPS]"""

import sys

import torch

from regard.tasks.text import python_text
from regard.tasks.training import fit
from regard.zoo.systems.block_transformer import BlockTransformerLM

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
torch.manual_seed(0)
text = python_text(1_000_000)
model = BlockTransformerLM(256, block_len=4, dim=64, n_block_layers=2, n_token_layers=2, heads=2)
held_out = text.held_out(127, 8)


def bits():
    with torch.no_grad():
        return float(model.loss(held_out)) / 0.6931


print(f"before training: {bits():.2f} bits per byte")
fit(model, lambda generator: model.aligned(text.batch(8, 127, generator), generator), lambda batch: model.loss(*batch), steps, lr=3e-3)
print(f"after {steps} steps: {bits():.2f} bits per byte")

prompt = torch.tensor([list(b"def forward(self, x):\n    return ")])
state = model.prefill(prompt[:, : prompt.shape[1] // 4 * 4])
per_token = sum(layer.keys.shape[2] for layer in state.blocks.layers) / len(state.blocks.layers) / prompt.shape[1]
print(f"entries of the block decoder's cache a token of the prompt: {per_token:.2f}")
print(bytes(model.generate(prompt, 40)[0].tolist()).decode(errors="replace"))
