"""Block-Attention: half precision, a store of few blocks, eager attention, bad input."""

import pytest
import torch

from regard import RegardError
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.block_attention import BlockKVStore, block_attention_mask, block_logits


def test_few_blocks_are_kept_and_generation_goes_on():
    model, blocks = llama(), [torch.randint(1, 50, (n,)) for n in (3, 4, 5)]
    store = BlockKVStore(model, most=2)
    first, _ = store.prefill(blocks, torch.tensor([7, 8]))
    assert len(store.blocks) == 2 and store.forwarded == 14
    again, cache = store.prefill(blocks[1:], torch.tensor([7, 8]))
    assert store.forwarded == 16 and cache.get_seq_length() == 11 and again.shape == first.shape
    store.clear()
    assert not store.blocks


def test_kept_in_bfloat16():
    model, blocks = llama(), [torch.randint(1, 50, (n,)) for n in (3, 4)]
    half, whole = BlockKVStore(model, dtype=torch.bfloat16), BlockKVStore(model)
    a, b = (store.prefill(blocks, torch.tensor([7, 8]))[0] for store in (half, whole))
    assert half.block(blocks[0]).keys[0].dtype == torch.bfloat16 and a.dtype == torch.float64 and 0 < (a - b).abs().max() < 0.05


def test_fine_tuning_reads_the_mask():
    model, blocks, final = llama().float(), [torch.randint(1, 50, (n,)) for n in (3, 4)], torch.tensor([7, 8])
    truth = block_logits(model, blocks, final)
    model.set_attn_implementation("eager")
    assert torch.allclose(block_logits(model, blocks, final), truth, atol=1e-5)
    block_logits(model, blocks, final).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_bad_input():
    with pytest.raises(RegardError, match="a last block of at least 1"):
        block_attention_mask([2], 0)
    store = BlockKVStore(llama())
    for blocks, final in (
        ([torch.tensor([], dtype=torch.long)], torch.tensor([1])),
        ([], torch.tensor([], dtype=torch.long)),
        ([], torch.ones(1, 2)),
    ):
        with pytest.raises(RegardError, match="at least one token each"):
            store.prefill(blocks, final)
    with pytest.raises(RegardError, match="most=0"):
        BlockKVStore(llama(), most=0)
    model = llama()
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(RegardError, match="plain rotary positions"):
        BlockKVStore(model)
