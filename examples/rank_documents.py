"""Documents ranked in one context by what a layer's attention reads, each having seen itself alone: python examples/rank_documents.py [STEPS]"""

import sys

import torch

from regard import models
from regard.zoo.systems.blockrank import blockrank_aux_loss, blockrank_positions, rank_by_attention, ranking

steps, documents, keys = int(sys.argv[1]) if len(sys.argv) > 1 else 200, 16, 24


def asked(count, generator):
    """Each document names a key and its own id; the last block asks for a key: ids, labels (count, M H), mask (count, M, H), answers (count, 1)."""
    ids = torch.zeros(count, documents + 2, 4, dtype=torch.long)
    names = torch.rand(count, keys, generator=generator).argsort(1)[:, :documents]
    answer = torch.randint(0, documents, (count, 1), generator=generator)
    ids[:, 0, -1], ids[:, 1:-1, -3], ids[:, 1:-1, -2], ids[:, 1:-1, -1] = 1, 2, 4 + names, 4 + keys + torch.arange(documents)
    ids[:, -1, 0], ids[:, -1, 1], ids[:, -1, 2], ids[:, -1, 3] = 2, 4 + names.gather(1, answer)[:, 0], 3, 4 + keys + answer[:, 0]
    labels = torch.full_like(ids, -100)
    labels[:, -1, 2:] = ids[:, -1, 2:]
    return ids.flatten(1), labels.flatten(1), ids > 0, answer


torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
llama = models.load("tiny")  # any decoder of transformers will do; this one is made anew, smaller
model = type(llama)(type(llama.config)(vocab_size=4 + keys + documents, pad_token_id=0, initializer_range=0.1, **sizes))
optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)


def found():
    ids, labels, mask, answers = asked(200, torch.Generator().manual_seed(1))
    return float((rank_by_attention(model, ids, mask, labels, layer=1)[:, :1] == answers).float().mean())


print(f"before training: the right document stands first for {found():.0%} of queries")
for _ in range(steps):
    ids, labels, mask, answers = asked(16, generator)
    with ranking(model, mask, layer=1) as seen:
        logits = model(input_ids=ids, position_ids=blockrank_positions(mask), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = loss + 0.1 * blockrank_aux_loss(seen.scores, labels, answers, mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"after {steps} steps: {found():.0%}, by attention of layer 1 alone; later layers do not run")
