"""Train the byte-level Llama that ships as `regard.models.load("tiny")`: about two hours on two cores.

    python scripts/train_tiny.py OUT [--prose FOLDER] [--minutes 60] [--resume FOLDER --lesson retrieval]

Text: Python's documentation and standard library, and the .txt files of --prose; every tenth document is held out. Some sequences
teach what experiments on attention ask of a model: random strings that come again (induction) and facts asked for later
("The key of NAME is 12345.", anywhere in the context). Every sequence begins with the byte 0, the model's beginning-of-text token.
The lesson "text" is mostly text; the lesson "retrieval", for a model that knows text, is mostly facts and weighs the answers' bytes.
The context grows from 256 to 2048 bytes. Writes config.json, model.safetensors (bfloat16) and training.json (settings, versions and
the loss along the way, after those of the model resumed) to OUT.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from regard.models.needles import fact, question
from regard.tasks.text import Corpus, corpus, python_text

STAGES = ((0.45, 256, 32), (0.8, 1024, 8), (1.0, 2048, 4))  # (until this share of the time, context, batch): 8192 bytes a step
RATE, EMBEDDING_RATE, WARMUP = 0.02, 4e-3, 100
BEGIN = 0  # the beginning-of-text byte: no text holds it


@dataclass(frozen=True)
class Lesson:
    """Shares of sequences with repeated strings and with facts, the weight of an answer's byte in the loss, and a factor on the rates."""

    repeated: float
    facts: float
    weight: float
    rate: float


LESSONS = {"text": Lesson(0.1, 0.2, 1.0, 1.0), "retrieval": Lesson(0.05, 0.7, 10.0, 0.5)}


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
        bos_token_id=BEGIN,
        eos_token_id=None,
        pad_token_id=1,
    )


def repeated(row: Tensor, draw: random.Random) -> None:
    """A random string of 8 to 48 characters, twice or three times, at random places of the row."""
    text = bytes(draw.choice((string.ascii_letters + string.digits).encode()) for _ in range(draw.randint(8, 48)))
    for _ in range(draw.randint(2, 3)):
        at = draw.randrange(len(row) - len(text))
        row[at : at + len(text)] = torch.tensor(list(text))


def retrieved(row: Tensor, weights: Tensor, draw: random.Random, weight: float) -> None:
    """One to four facts in the text, each asked for once or twice after the last of them; the answers' bytes weigh `weight`."""
    facts = [fact(draw) for _ in range(draw.randint(1, 4))]
    asked = [one for one in facts for _ in range(draw.randint(1, 2))]
    draw.shuffle(asked)
    ends = [question(one.name, one.value) + b".\n" for one in asked]
    gaps = [draw.randint(0, 12) if len(row) > 256 else 0 for _ in ends]
    end = len(row)
    for text, gap in zip(ends, gaps):
        if end - len(text) - gap < len(row) // 2:
            break
        at = end - len(text)
        row[at:end] = torch.tensor(list(text))
        weights[end - 7 : end - 2] = weight
        end = at - gap
    room = end // len(facts)
    for number, one in enumerate(facts):
        at = number * room + draw.randrange(max(room - len(one.text), 1))
        row[at : at + len(one.text)] = torch.tensor(list(one.text))


def batch(data: Corpus, count: int, length: int, lesson: Lesson, generator: torch.Generator, draw: random.Random) -> tuple[Tensor, Tensor]:
    """Rows [count, length + 1] of bytes and the weight of each in the loss."""
    rows = data.batch(count, length, generator)
    weights = torch.ones(rows.shape)
    for row, each in zip(rows, weights):
        kind = draw.random()
        if kind < lesson.repeated:
            repeated(row, draw)
        elif kind < lesson.repeated + lesson.facts:
            retrieved(row, each, draw, lesson.weight)
    rows[:, 0] = BEGIN
    return rows, weights


def train(out: Path, prose: Path | None, minutes: float, resume: Path | None, name: str, seed: int = 0) -> None:
    import transformers
    from transformers import LlamaForCausalLM

    seed += resume is not None
    torch.manual_seed(seed)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    texts = [python_text(30_000_000)]
    if prose is not None:
        texts.append(corpus("prose", [part for path in sorted(prose.glob("*.txt")) for part in path.read_bytes().split(b"\n \n = ")]))
    data = Corpus("all", torch.cat([text.train for text in texts]), torch.cat([text.valid for text in texts]))
    lesson, before = LESSONS[name], None
    if resume is None:
        model = LlamaForCausalLM(model_config())
    else:
        model = LlamaForCausalLM.from_pretrained(resume, config=model_config(), dtype=torch.float32)
        before = json.loads((resume / "training.json").read_text())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    steps = (
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=EMBEDDING_RATE, betas=(0.9, 0.95)),
    )
    rates = [step.param_groups[0]["lr"] for step in steps]
    log, begin, seen, number = [], time.perf_counter(), 0, 0
    while (share := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        _, length, count = next(stage for stage in STAGES if share < stage[0])
        rows, weights = batch(data, count, length, lesson, generator, draw)
        for step, rate in zip(steps, rates):
            step.param_groups[0]["lr"] = lesson.rate * rate * min(1.0, (number + 1) / WARMUP, 2 * (1 - share))
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        heavy = weights[:, 1:].flatten()
        answers, loss = loss.detach()[heavy > 1].mean().item(), (loss * heavy).sum() / heavy.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in steps:
            step.step()
            step.zero_grad()
        seen, number = seen + count * length, number + 1
        if number % 50 == 0:
            log.append(
                {
                    "step": number,
                    "bytes": seen,
                    "context": length,
                    "loss_bits": round(loss.item() / 0.6931, 3),
                    "answer_bits": round(answers / 0.6931, 3),
                }
            )
            print(json.dumps(log[-1] | {"minutes": round((time.perf_counter() - begin) / 60, 1)}), flush=True)
        if number % 500 == 0:
            save(model, out)
    save(model, out)
    facts = {
        "data": [text.name for text in texts], "train_bytes": len(data.train), "seed": seed, "minutes": minutes, "stages": STAGES,
        "lesson": asdict(lesson), "rates": [RATE, EMBEDDING_RATE], "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__, "transformers": transformers.__version__, "log": log[::4], "before": before,
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
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--lesson", choices=tuple(LESSONS), default="text")
    given = parser.parse_args()
    train(given.out, given.prose, given.minutes, given.resume, given.lesson)
