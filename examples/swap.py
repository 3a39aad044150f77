"""Swap another mechanism into a pretrained model; its code and its weights are not touched: python examples/swap.py"""

import torch

import regard
from regard import models

model = models.load("tiny")  # or AutoModelForCausalLM.from_pretrained(...): any Llama, Qwen, Mistral, Gemma, GPT-2, BERT, ViT, ...
text = "The interpreter reads each line of a file and then it executes what it has read, line by line, until the file ends. " * 8
ids = models.encode(text)


def bits() -> float:
    with torch.no_grad():
        return model(ids, labels=ids).loss.item() / 0.6931


print(f"its own attention            {bits():.3f} bits per byte")
for mechanism in ("softpick", regard.get("moba", block_size=32, top_k=4), regard.get("flexprefill", block_size=32, min_budget=64)):
    with regard.adapt.patch(model, mechanism, when="prefill"):
        name = mechanism if isinstance(mechanism, str) else type(mechanism.select).__name__
        print(f"{name:28} {bits():.3f} bits per byte")

# By name, without a patch: also in from_pretrained(..., attn_implementation=...), and generate.
model.set_attn_implementation("regard:moba?block_size=32&top_k=4")
print(f"{model.config._attn_implementation:28} {bits():.3f} bits per byte")
