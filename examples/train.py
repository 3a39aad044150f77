"""Train a small language model with any mechanism, on the text that ships with Python: python examples/train.py gla --steps 200"""

import argparse

import torch

from regard.models import RegardConfig, RegardForCausalLM
from regard.tasks import python_text

parser = argparse.ArgumentParser()
parser.add_argument("mechanism", nargs="?", default="gla", help="a name from `regard list`")
parser.add_argument("--steps", type=int, default=200)
asked = parser.parse_args()

torch.manual_seed(0)
corpus, generator = python_text(1_000_000), torch.Generator().manual_seed(0)
model = RegardForCausalLM(RegardConfig(asked.mechanism, vocab_size=256, hidden_size=64, num_attention_heads=2)).train()
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(asked.steps):
    tokens = corpus.batch(8, 128, generator)
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == asked.steps - 1:
        print(f"step {step}: {loss.item() / 0.6931:.3f} bits per byte")

prompt = torch.tensor([list(b"The ")])
print(bytes(model.eval().generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0].tolist()).decode(errors="replace"))
