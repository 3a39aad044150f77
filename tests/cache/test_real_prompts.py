"""A left-padded batch of real prompts gives each row what it gets alone: under every policy of the cache and every drafting strategy."""

import pytest
import torch

from regard import models
from regard.generate import generate
from regard.lab.greedy import strategies
from regard.lab.sweep import DEFAULT_POLICIES, policy
from regard.tasks.text import python_text
from regard.zoo.systems.s2_attention import S2Cache, s2_block_mask

pytest.importorskip("transformers")
LENGTHS, NEW = (72, 45, 21), 7  # the last row drops tokens that it said itself
SETTINGS = {
    **dict.fromkeys(DEFAULT_POLICIES, "budget=0.4"),
    "snapkv": "budget=0.4,window=8",
    "pyramidkv": "budget=0.6,window=4,beta=4",
    "adakv": "budget=0.4,window=8",
    "vatp": "budget=0.4,sink=4",
    "duoattention": "sparsity=0.5,sink=4,recent=12,chunk=16",
    "recycled-attention": "stride=3,k=16",
    "kivi": "bits=2,group=8,recent=16",
    "kivi+snapkv": "bits=4,group=8,recent=8,budget=0.5,window=4",
}


@pytest.fixture(scope="module")
def tiny():
    model, text = models.load("tiny").double(), python_text(200_000).valid
    ids, mask = torch.zeros(3, max(LENGTHS), dtype=torch.long), torch.zeros(3, max(LENGTHS), dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        ids[row, -n:] = torch.cat((torch.tensor([models.BEGIN]), text[5000 * row : 5000 * row + n - 1].long()))
        mask[row, -n:] = 1
    return model, ids, mask


def alike(model, ids, mask):
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    both = model.generate(ids, attention_mask=mask, **options)
    for row, n in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -n:], attention_mask=mask[row : row + 1, -n:], **options)
        assert torch.equal(alone.sequences[0, n:], both.sequences[row, ids.shape[1] :]), row
        assert max(float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, both.logits, strict=True)) < 1e-8


@pytest.mark.parametrize("name", [*SETTINGS, "s2"])
def test_policies(tiny, name):
    gates = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    layout = s2_block_mask(8, 96, block=8, local_blocks=2, stride=3, n_kv_heads=4)
    with (S2Cache(layout, 8) if name == "s2" else policy(name, SETTINGS[name], lambda: gates))(tiny[0]):
        alike(*tiny)


def test_strategies(tiny):
    model, ids, mask = tiny
    for name, make in strategies(model).items():
        both = generate(model, ids, make(), attention_mask=mask, max_new_tokens=NEW, ends=()).tokens
        for row, n in enumerate(LENGTHS):
            alone = generate(model, ids[row : row + 1, -n:], make(), max_new_tokens=NEW, ends=()).tokens
            assert torch.equal(alone[0, n:], both[row, ids.shape[1] :]), (name, row)
