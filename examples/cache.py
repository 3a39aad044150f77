"""Decode with less memory: entries of the cache are dropped for good, or kept by heads that need them: python examples/cache.py"""

import torch

from regard import models
from regard.cache import H2O, KIVI, Full, KeyNorm, Random, SnapKV, StreamingLLM

model = models.load("tiny")
text = "def add(a, b):\n    return a + b\n\n" * 12
ids = models.encode(text)
chance = Random(128, generator=torch.Generator().manual_seed(0))
for policy in (Full(), StreamingLLM(128), H2O(128), SnapKV(128), KeyNorm(128), KIVI(4), KIVI(2, recent=32, base=SnapKV(128)), chance):
    with policy(model) as session:
        out = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
    said = models.decode(out[0, ids.shape[1] :])
    print(f"{type(policy).__name__:14} {sum(layer.bytes for layer in session.cache.layers):>9,} bytes kept  {said!r}")
