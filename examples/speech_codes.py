"""A codec language model of gated linear attention, and a new voice as first states of its layers: python examples/speech_codes.py [STEPS]"""

import sys

import torch

from regard.tasks.training import fit
from regard.zoo.systems.lina_speech import InitialStateTuner, LinaLM, delayed, undelayed

steps, symbols, codes = int(sys.argv[1]) if len(sys.argv) > 1 else 160, 6, 12


def speech(generator, voices, count=8):
    """Texts of six symbols; three frames each of two streams of codes, which a speaker's voice moves up by a number."""
    text = torch.randint(0, symbols, (count, 6), generator=generator)
    voice = torch.tensor(voices)[torch.randint(0, len(voices), (count, 1), generator=generator)]
    code = ((2 * text + voice) % codes).repeat_interleave(3, 1)
    return text + 1, delayed(torch.stack((code, (code + 1) % codes), 1))


torch.manual_seed(0)
model = LinaLM(symbols + 1, codes, n_quant=2, dim=32, heads=2, layers=1, text_layers=1, dropout=0.0)
losses = fit(model, lambda generator: speech(generator, (0, 6)), lambda batch: model.loss(*batch), steps, lr=4e-3)
print(f"two speakers, {steps} steps: loss {losses[0]:.2f} to {losses[-1]:.2f}")

text, tokens = speech(torch.Generator().manual_seed(1), (3,), 32)
draw = torch.Generator().manual_seed(2)
voice = InitialStateTuner(model, generator=draw).fit(model, [speech(draw, (3,), 2) for _ in range(2 * steps)])
with torch.no_grad():
    before, after = float(model.loss(text, tokens)), float(model.loss(text, tokens, voice.states()))
print(
    f"a speaker it has not heard: loss {before:.2f}, {after:.2f} with first states of {sum(p.numel() for p in voice.parameters())} numbers"
)
said = undelayed(model.generate(text[:1], most=tokens.shape[1] - 1, top=1))[0, 0]  # in one of the two voices it knows
print("symbols read:", (text[0] - 1).tolist())
print("codes said:  ", said.tolist())
