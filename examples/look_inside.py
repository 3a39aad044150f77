"""Read and edit attention at named points, in chosen layers and heads, while the rest runs as it did: python examples/look_inside.py"""

import torch

import regard
from regard import models
from regard.interpret import ablated, attention_view
from regard.taps import ColumnMass, Entropy

model = models.load("tiny")
ids = models.encode("import os\nimport sys\nimport json\n" * 6)

# Whole maps of two layers, and of all layers how much each token is looked at, which never holds a map.
with torch.no_grad(), regard.taps(model, ["weights", ColumnMass(), Entropy()]) as seen:
    own = model(ids).logits
for layer, maps in seen.items("weights"):
    first = maps[0, :, 1:, 0].mean(-1)
    entropy = seen[Entropy().name, layer][0].mean(-1)
    print(
        f"layer {layer}: weight on the first token by head",
        [round(x, 2) for x in first.tolist()],
        "entropy",
        [round(x, 1) for x in entropy.tolist()],
    )
print("the most looked-at token of layer 3:", repr(models.decode(ids[0, seen[ColumnMass().name, 3][0].sum(0)[1:].argmax() + 1].reshape(1))))

# An edit: two heads of layer 2 say nothing. What nobody edits stays as it was, and leaving the block restores the model.
with torch.no_grad(), regard.taps.edit(model, {"heads": lambda o: 0 * o}, layers=[2], heads=[0, 1]):
    edited = model(ids).logits
print("largest change of a logit without heads 0 and 1 of layer 2:", float((edited - own).abs().max()))
with torch.no_grad():
    assert torch.equal(model(ids).logits, own)
    with ablated(model, [(2, 0), (2, 1)]):
        print("the same by regard.interpret.ablated:", float((model(ids).logits - own).abs().max()))

# The maps themselves to walk through, token by token and head by head: one page that needs no network.
words = [models.decode(token.reshape(1)) for token in ids[0]]
print("open", attention_view(model, ids, words).save("attention.html"), "in a browser")
