"""A pretrained model made linear, stage by stage: python benchmarks/conversion.py --out benchmarks/results/conversion.json

Bits per byte of held-out text before, after copying, after each stage, and for the control that skips the transfer; greedy continuations; bytes
of the decode state against those of keys and values. An interrupted run goes on where it stopped. Text: Python's documentation and standard
library, or a file (--text).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from regard import adapt, models
from regard.adapt.host import cache_argument
from regard.adapt.kept_state import state_bytes
from regard.adapt.stages import next_token_loss
from regard.lab.files import write_text
from regard.lab.sweep.reader import model_and_reader
from regard.tasks.text import python_text, read_text
from regard.zoo.systems.lolcats import attention_transfer, convert_lolcats, lora_finetune

PROMPT = 160  # tokens of held-out text that are continued: more than the window, so that the state is read


class Benchmark:
    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.found = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"settings": {}, "bits": {}, "said": {}}
        self.found["settings"] = {key: str(x) if isinstance(x, Path) else x for key, x in vars(asked).items()} | {
            "torch": torch.__version__
        }
        self.model, self.reader = model_and_reader(asked.model)
        self.corpus = python_text() if asked.text is None else read_text(asked.text, 10 * asked.length)
        begin = [] if self.reader.begin is None else [self.reader.begin]
        self.begin = begin

    def ids(self, text: torch.Tensor) -> list[int]:
        return (self.begin + self.reader.tokens(bytes(text.tolist())))[: self.asked.length]

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        span = 8 * self.asked.length  # bytes that surely hold so many tokens
        while True:
            at = int(torch.randint(len(self.corpus.train) - span, (1,), generator=generator))
            ids = self.ids(self.corpus.train[at : at + span])
            if len(ids) == self.asked.length:
                return torch.tensor([ids])

    @torch.no_grad()
    def bits(self) -> float:
        """Of held-out text, a byte."""
        nats, size, span = 0.0, 0, 8 * self.asked.length
        for at in torch.linspace(0, len(self.corpus.valid) - span, self.asked.texts).long().tolist():
            ids = self.ids(self.corpus.valid[at : at + span])
            row = torch.tensor([ids])
            nats += next_token_loss(self.model(input_ids=row, use_cache=False).logits, row).item() * (len(ids) - 1)
            size += self.reader.size(ids[max(1, len(self.begin)) :])
        return nats / math.log(2) / size

    @torch.no_grad()
    def said(self, tokens: int = 40, prompts: int = 2) -> list[str]:
        """The end of each prompt, and what the model makes of it."""
        out, span = [], 8 * self.asked.length
        for at in torch.linspace(0, len(self.corpus.valid) - span, prompts + 2).long().tolist()[1:-1]:
            ids = torch.tensor([self.ids(self.corpus.valid[at : at + span])[:PROMPT]])
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            out.append(f"{self.reader.text(ids[0].tolist())[-80:]} >>> {self.reader.text(made[0, ids.shape[1] :].tolist())}")
        return out

    def measure(self, name: str) -> None:
        if name in self.found["bits"]:
            return
        self.found["bits"][name] = self.bits()
        self.found["said"][name] = self.said()
        print(f"{name:40} {self.found['bits'][name]:.4f} bits per byte", flush=True)
        self.keep()

    def keep(self) -> None:
        write_text(self.asked.out, json.dumps(self.found, indent=1))

    @torch.no_grad()
    def bytes_at(self, lengths: tuple[int, ...] = (256, 512, 1024, 2048)) -> dict[str, int]:
        """Bytes of the cache, and seconds of a step, when so many tokens have been read."""
        sizes, seen, out = {}, 0, None
        ids = torch.randint(0, self.model.config.vocab_size, (1, lengths[-1] + len(lengths)), generator=torch.Generator().manual_seed(0))
        name, cache = cache_argument(self.model), None
        for length in lengths:
            while seen < length:
                stop = min(length, seen + 512)
                out = self.model(input_ids=ids[:, seen:stop], use_cache=True, logits_to_keep=1, **({} if cache is None else {name: cache}))
                cache, seen = out[name], stop
            kept = state_bytes(cache) or sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            begin = time.perf_counter()
            self.model(input_ids=ids[:, seen : seen + 1], use_cache=True, **{name: cache})
            seen += 1
            sizes[str(length)] = {"bytes": kept, "seconds": time.perf_counter() - begin}
        return sizes

    def recipe(self, transfer: bool) -> list[adapt.Stage]:
        asked = self.asked
        first = attention_transfer(asked.transfer_steps, accumulate=1, schedule="cosine", final_lr=1e-3)
        second = lora_finetune(asked.lora_steps, asked.lora_lr, accumulate=1, schedule="cosine")
        return [first, second] if transfer else [second]

    def convert(self, transfer: bool) -> None:
        """Copy, and every stage; the model is its own again at the end."""
        label = "" if transfer else "control, no transfer: "
        names = ["after attention transfer", "after LoRA"] if transfer else ["after LoRA"]
        if all(label + name in self.found["bits"] for name in names) and (not transfer or "converted" in self.found.get("cache", {})):
            return
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        conversion = convert_lolcats(self.model, self.asked.window)
        if transfer:
            self.measure("copied, no training")
        folder = self.asked.folder / ("transfer" if transfer else "control")

        def watch(number: int, stage: adapt.Stage) -> None:
            self.measure(label + names[number])

        report = adapt.carry_out(
            conversion, self.recipe(transfer), self.draw, folder=folder, save_every=10, progress=self.asked.progress, watch=watch
        )
        for name, losses in zip(report.stages, report.losses, strict=True):
            self.found.setdefault("losses", {})[label + name] = [
                sum(losses[at : at + 10]) / len(losses[at : at + 10]) for at in range(0, len(losses), 10)
            ]
        self.found.setdefault("seconds", {})[label or "transfer, LoRA"] = report.seconds
        if transfer:
            self.model.eval()
            self.found.setdefault("cache", {})["converted"] = self.bytes_at()
        conversion.restore()
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(before[name])
        self.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.names(), default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="a UTF-8 file instead of Python's own text")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens a text")
    parser.add_argument("--texts", type=int, default=8, help="held-out texts")
    parser.add_argument("--transfer-steps", type=int, default=80)
    parser.add_argument("--lora-steps", type=int, default=30)
    parser.add_argument("--lora-lr", type=float, default=3e-4)
    parser.add_argument("--folder", type=Path, default=Path("build/conversion"), help="where an interrupted run goes on from")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conversion.json"))
    parser.add_argument("--progress", action="store_true")
    benchmark = Benchmark(parser.parse_args())
    benchmark.measure("the model itself")
    if "model" not in benchmark.found.get("cache", {}):
        benchmark.found.setdefault("cache", {})["model"] = benchmark.bytes_at()
    for transfer in (True, False):
        benchmark.convert(transfer)


if __name__ == "__main__":
    main()
