"""Block Transformer: padded batches in training, sampling, alignment, bad input."""

import pytest
import torch

from regard import RegardError
from regard.zoo.systems.block_transformer import BlockTransformerLM


def small(**options):
    return BlockTransformerLM(20, 4, 16, 1, 1, 2, 32, positions=64, **options).double().eval()


def test_rows_of_a_padded_batch_get_what_they_get_alone():
    model, ids = small(), torch.randint(1, 20, (2, 16))
    mask = torch.arange(16) >= torch.tensor([[0], [6]])
    both = model(ids, mask)
    alone = model(torch.nn.functional.pad(ids[1:, 6:], (2, 0)), torch.nn.functional.pad(mask[1:, 6:], (2, 0)))
    assert torch.allclose(both[1, 4:], alone[0], atol=1e-9) and both.isfinite().all()
    other = ids.clone()
    other[1, :6] = 9
    assert torch.equal(model(other, mask)[1, 4:], both[1, 4:])
    losses = torch.nn.functional.cross_entropy(both[1, 4:], ids[1, 8:], reduction="none")
    assert torch.allclose(model.loss(ids[1:], mask[1:]), losses.mean())


def test_texts_are_aligned_anyhow():
    model, text = small(), torch.randint(1, 20, (3, 18))
    seen = set()
    for seed in range(20):
        ids, mask = model.aligned(text, torch.Generator().manual_seed(seed))
        ahead = int((~mask[0]).sum())
        seen.add(ahead)
        assert ids.shape == mask.shape and ids.shape[1] % 4 == 0 and ids.shape[1] >= 16
        assert torch.equal(ids[:, ahead:], text[:, : ids.shape[1] - ahead])
    assert seen == {0, 1, 2, 3}


def test_gradients_reach_all_parameters():
    for strategy in ("prefix", "summation"):
        model = small(strategy=strategy)
        model.loss(torch.randint(1, 20, (2, 16))).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sampling_and_short_prompts():
    model = small()
    out = model.generate(torch.tensor([[5]]), 9, do_sample=True, generator=torch.Generator().manual_seed(0))
    assert out.shape == (1, 10) and torch.equal(out[:, :1], torch.tensor([[5]]))
    assert model(torch.randint(1, 20, (2, 4))).shape == (2, 0, 20)


def test_bad_input():
    model = small()
    for ids, mask, told in (
        (torch.ones(2, 6).long(), None, "a multiple of block_len=4"),
        (torch.ones(2, 0).long(), None, "a multiple of block_len=4"),
        (torch.ones(2, 8).long(), torch.arange(8)[None].expand(2, -1) < 4, "padding on the left"),
        (torch.ones(2, 8).long(), torch.ones(2, 4), "the same shape"),
    ):
        with pytest.raises(RegardError, match=told):
            model(ids, mask)
    with pytest.raises(RegardError, match="a token in every row"):
        model.generate(torch.ones(2, 8).long(), 2, mask=torch.zeros(2, 8))
    for options in ({"strategy": "sum"}, {"parts": 0}, {"strategy": "summation", "parts": 2}, {"pad": 20}, {"start": -1}):
        with pytest.raises(RegardError, match="expected"):
            small(**options)
    with pytest.raises(RegardError, match="tokens in two blocks"):
        model.loss(torch.ones(2, 4).long())
    with pytest.raises(RegardError, match="dim=18"):
        BlockTransformerLM(20, 4, 18)
    with pytest.raises(RegardError, match="GPTNeoXForCausalLM"):
        BlockTransformerLM.from_vanilla(torch.nn.Linear(1, 1))


def test_both_decoders_are_gpt_neox_of_these_sizes():
    model = BlockTransformerLM(20, 4, 16, 2, 3, 2, None, rotary=0.5, positions=33, eps=1e-3)
    for decoder, layers in ((model.block_decoder, 2), (model.token_decoder, 3)):
        config = decoder.config
        sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size)
        assert sizes == (layers, 16, 2, 64) and config.max_position_embeddings == 33 and config.vocab_size == 20
        assert config.rope_parameters["rope_theta"] == 10000.0 and config.rope_parameters["partial_rotary_factor"] == 0.5
        assert {m.eps for m in decoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}
        assert decoder.get_input_embeddings() is None and decoder.rotary_emb.inv_freq.shape == (2,)
    assert BlockTransformerLM(20, 4, 16, 1, 1, 2, 24).token_decoder.config.intermediate_size == 24
    assert (model.parts, model.expand.out_features, small(strategy="summation").parts, small(parts=3).expand.out_features) == (2, 32, 4, 48)


def test_from_a_plain_model_layer_by_layer():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40}
    plain = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=20, layer_norm_eps=1e-4, rope_parameters=rope, **sizes)).double()
    for p in plain.parameters():
        p.data.normal_()
    made = BlockTransformerLM.from_vanilla(plain, 2, parts=3)
    assert (made.block_len, made.parts, len(made.block_decoder.layers), len(made.token_decoder.layers)) == (2, 3, 1, 2)
    for own, other in zip((*made.block_decoder.layers, *made.token_decoder.layers), plain.gpt_neox.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(made.embed.weight, plain.gpt_neox.embed_in.weight) and torch.equal(
        made.head.weight, plain.get_output_embeddings().weight
    )
    assert torch.equal(made.token_decoder.final_layer_norm.weight, plain.gpt_neox.final_layer_norm.weight)
    config = made.token_decoder.config
    assert made.head.weight.dtype == torch.float64 and config.rope_parameters["partial_rotary_factor"] == 0.5
    assert (config.layer_norm_eps, config.intermediate_size, config.max_position_embeddings) == (1e-4, 24, 40)
