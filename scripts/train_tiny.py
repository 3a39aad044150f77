"""Train the byte-level Llama that ships as `regard.models.load("tiny")`: about an hour on two cores.

    python scripts/train_tiny.py OUT [--prose FOLDER] [--minutes 60]

Text: Python's documentation and standard library, and the .txt files of --prose; every tenth document is held out. A quarter of the
sequences teach what experiments on attention ask of a model: random strings that come again (induction) and facts asked for later
("The key of NAME is 12345.", anywhere in the context). The context grows from 256 to 2048 bytes. Writes config.json,
model.safetensors (bfloat16) and training.json (settings, versions and the loss along the way) to OUT.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from pathlib import Path

import torch
from torch import Tensor

from regard.models.needles import fact, question
from regard.tasks.text import Corpus, corpus, python_text

STAGES = ((0.45, 256, 32), (0.8, 1024, 8), (1.0, 2048, 4))  # (until this share of the time, context, batch): 8192 bytes a step
RATE, EMBEDDING_RATE, WARMUP = 0.02, 4e-3, 100


def model_config() -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def repeated(row: Tensor, draw: random.Random) -> None:
    """A random string of 8 to 48 characters, twice or three times, at random places of the row."""
    text = bytes(draw.choice((string.ascii_letters + string.digits).encode()) for _ in range(draw.randint(8, 48)))
    for _ in range(draw.randint(2, 3)):
        at = draw.randrange(len(row) - len(text))
        row[at : at + len(text)] = torch.tensor(list(text))


def retrieved(row: Tensor, draw: random.Random) -> None:
    """One to four facts in the text, one asked for at the end."""
    facts = [fact(draw) for _ in range(draw.randint(1, 4))]
    end = question(facts[0].name, facts[0].value)
    row[-len(end) :] = torch.tensor(list(end))
    room = (len(row) - len(end)) // len(facts)
    draw.shuffle(facts)
    for number, one in enumerate(facts):
        at = number * room + draw.randrange(max(room - len(one.text), 1))
        row[at : at + len(one.text)] = torch.tensor(list(one.text))


def batch(data: Corpus, count: int, length: int, generator: torch.Generator, draw: random.Random) -> Tensor:
    rows = data.batch(count, length, generator)
    for row in rows:
        kind = draw.random()
        if kind < 0.1:
            repeated(row, draw)
        elif kind < 0.3:
            retrieved(row, draw)
    return rows


def train(out: Path, prose: Path | None, minutes: float, seed: int = 0) -> None:
    import transformers
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [python_text(30_000_000)]
    if prose is not None:
        texts.append(corpus("prose", [part for path in sorted(prose.glob("*.txt")) for part in path.read_bytes().split(b"\n \n = ")]))
    data = Corpus("all", torch.cat([text.train for text in texts]), torch.cat([text.valid for text in texts]))
    model = LlamaForCausalLM(model_config())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    steps = (torch.optim.Muon(matrices, lr=RATE, weight_decay=0.01, momentum=0.95), torch.optim.AdamW(others, lr=EMBEDDING_RATE, betas=(0.9, 0.95)))
    rates = [step.param_groups[0]["lr"] for step in steps]
    log, begin, seen, number = [], time.perf_counter(), 0, 0
    while (share := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        _, length, count = next(stage for stage in STAGES if share < stage[0])
        rows = batch(data, count, length, generator, draw)
        for step, rate in zip(steps, rates):
            step.param_groups[0]["lr"] = rate * min(1.0, (number + 1) / WARMUP, 2 * (1 - share))
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in steps:
            step.step()
            step.zero_grad()
        seen, number = seen + count * length, number + 1
        if number % 50 == 0:
            log.append({"step": number, "bytes": seen, "context": length, "loss_bits": round(loss.item() / 0.6931, 3)})
            print(json.dumps(log[-1] | {"minutes": round((time.perf_counter() - begin) / 60, 1)}), flush=True)
        if number % 500 == 0:
            save(model, out)
    save(model, out)
    facts = {
        "data": [text.name for text in texts], "train_bytes": len(data.train), "seed": seed, "minutes": minutes, "stages": STAGES,
        "rates": [RATE, EMBEDDING_RATE], "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__, "transformers": transformers.__version__, "log": log[::4],
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def save(model: torch.nn.Module, out: Path) -> None:
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out, safe_serialization=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    train(given.out, given.prose, given.minutes)
