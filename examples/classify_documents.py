"""A document to one vector by heads that look for what matters, and where they looked: python examples/classify_documents.py [STEPS]"""

import sys

import torch

from regard.zoo.systems.lama import LAMAClassifier, diversity

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
torch.manual_seed(0)


def documents(count):
    """60 words, fewer in some; one of four topic words stands somewhere: words and keep (count, 60), topics and places (count,)."""
    words, topic = torch.randint(4, 40, (count, 60)), torch.randint(4, (count,))
    length = torch.randint(20, 61, (count,))
    place = (torch.rand(count) * length).long()
    words[torch.arange(count), place] = topic
    return words, torch.arange(60) < length[:, None], topic, place


model = LAMAClassifier(vocab=40, classes=4, embedding=16, units=16, heads=4)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(steps):
    words, keep, topic, _ = documents(48)
    weights = model.pool(model.encode(words, keep), keep)[1]
    loss = torch.nn.functional.cross_entropy(model(words, keep), topic) + 1e-3 * diversity(weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

words, keep, topic, place = documents(400)
with torch.no_grad():
    right = (model(words, keep).argmax(-1) == topic).float().mean()
    looked = model.pool(model.encode(words, keep), keep)[1].argmax(-1)
print(f"after {steps} steps: {float(right):.0%} of topics right")
print(f"the topic word is what some head looks at most in {float((looked == place[:, None]).any(1).float().mean()):.0%} of documents")
