"""Make a pretrained model linear: softmax over its last 32 tokens, a state of fixed size for all before: python examples/convert.py [STEPS]"""

import sys

import torch

from regard import adapt, models
from regard.adapt.kept_state import state_bytes
from regard.adapt.stages import bits_per_token
from regard.tasks.text import python_text
from regard.zoo.systems.lolcats import attention_transfer, convert_lolcats, lora_finetune

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
model, text = models.load("tiny"), python_text(400_000)


def begun(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.full_like(rows[:, :1], models.BEGIN), rows), 1)


def draw(generator: torch.Generator) -> torch.Tensor:
    return begun(text.batch(2, 127, generator))


def say(what: str) -> None:
    print(f"{what:28} {bits_per_token(model, begun(text.held_out(191, 4))):.3f} bits per byte", flush=True)


say("softmax")
conversion = convert_lolcats(model, window=32, feature_dim=16)  # weights are copied, feature maps are drawn
say("converted, not trained")
recipe = [attention_transfer(steps, accumulate=1), lora_finetune(steps // 4, lr=1e-3, accumulate=1)]
adapt.carry_out(conversion, recipe, draw, watch=lambda number, stage: say(f"after {stage.name}"))  # folder="...": resumable

ids = models.encode("def add(a, b):\n    return a + b\n\n" * 4)
for length in (60, 120):
    out = model(ids[:, :length], use_cache=True)
    print(f"state after {length} tokens: {state_bytes(getattr(out, 'cache', None) or out.past_key_values):,} bytes")
print(models.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]))
