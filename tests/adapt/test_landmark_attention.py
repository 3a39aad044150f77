"""A pretrained decoder with landmarks: its layers by loops, caches, padding, the new token, the recipe, generation, and what is refused."""

import pytest
import torch

pytest.importorskip("transformers")
from regard import RegardError
from regard.adapt import carry_out
from regard.adapt.landmarks import LandmarkTokens, convert_landmark, landmark_loss, landmark_tuning
from regard.lab.checks.shared.decoding import llama
from regard.nn.landmarks import with_landmarks


def by_hand(model, ids, block, top=None):
    """Logits of one text (L,), every layer's weights by loops over rows: own block and open landmarks share a softmax, opened blocks have their own."""
    x, n, size = model.model.embed_tokens(ids[None]), len(ids), block + 1
    cos, sin = model.model.rotary_emb(x, torch.arange(n)[None])
    for layer in model.model.layers:
        own, y, heads = layer.self_attn, layer.input_layernorm(x), []
        q, k, v = (p(y).view(n, -1, 8).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))
        q, k = (t * cos[0] + torch.cat((-t[..., 4:], t[..., :4]), -1) * sin[0] for t in (q, k))
        for h in range(len(q)):
            g, rows = h // (len(q) // len(k)), []
            for i in range(n):
                s = k[g] @ q[h, i] * 8**-0.5
                first = i // size * size
                near = [j for j in range(first, i + 1) if j % size != block]
                marks = list(range(block, first, size))
                if top is not None:
                    marks = sorted(marks, key=lambda j: -float(s[j]))[:top]
                out = torch.zeros(8, dtype=s.dtype)
                if near or marks:
                    p = s[[*near, *marks]].softmax(-1)
                    for weight, j in zip(p, [*near, *marks], strict=True):
                        if j in near:
                            out = out + weight * v[g, j]
                        else:
                            inside = list(range(j - block, j))
                            out = out + weight * (s[inside].softmax(-1) @ v[g, inside])
                rows.append(out)
            heads.append(torch.stack(rows))
        x = x + own.o_proj(torch.cat(heads, -1))[None]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))[0]


@torch.no_grad()
@pytest.mark.parametrize("top", [None, 1, 2])
def test_layers_by_loops_whole_and_in_a_cache(top):
    model = llama(sharp=2)
    convert_landmark(model, 4, top)
    ids = with_landmarks(torch.randint(1, 50, (2, 17)), 4, model.config.landmark_token_id)
    truth = torch.stack([by_hand(model, row, 4, top) for row in ids])
    assert torch.allclose(model(ids, use_cache=False).logits, truth, atol=1e-9)
    cache, outs, at = None, [], 0
    for stop in (6, 7, 15, 16, 21):
        out = model(ids[:, at:stop], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, stop
        outs.append(out.logits)
    assert torch.allclose(torch.cat(outs, 1), truth, atol=1e-9)


@torch.no_grad()
def test_long_rows_in_pieces_and_padding_without_a_cache():
    model = llama(layers=1)
    convert_landmark(model, 7, 3)
    landmark = model.config.landmark_token_id
    long = with_landmarks(torch.randint(1, 50, (1, 560)), 7, landmark)
    kept = model(long, use_cache=False).logits
    assert torch.allclose(model(long[:, :600], use_cache=False).logits, kept[:, :600], atol=1e-9)
    short = with_landmarks(torch.randint(1, 50, (1, 12)), 7, landmark)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1)
    both = torch.cat((padded, long[:, : padded.shape[1]]))
    mask = torch.ones_like(both)
    mask[0, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model(both, attention_mask=mask, position_ids=places, use_cache=False).logits
    assert torch.allclose(out[0, 5:], model(short, use_cache=False).logits[0], atol=1e-9)
    assert torch.allclose(out[1], kept[0, : padded.shape[1]], atol=1e-9)
    with pytest.raises(RegardError, match="padded text with a cache"):
        model(both, attention_mask=mask, position_ids=places, use_cache=True)


@pytest.mark.parametrize("tied", [False, True])
def test_the_new_token_and_the_recipe(tied):
    model = llama(layers=1)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    before = model.model.embed_tokens.weight.detach().clone()
    conversion = convert_landmark(model, 3)
    table, landmark = model.get_input_embeddings().weight, model.config.landmark_token_id
    assert landmark == 50 and table.shape[0] == 51 and torch.equal(table[:50], before) and torch.allclose(table[50], before.mean(0))
    assert model.lm_head.weight.shape[0] == 51 and (model.lm_head.weight.data_ptr() == table.data_ptr()) == tied
    ids = with_landmarks(torch.randint(1, 50, (2, 9)), 3, landmark)
    logits = model(ids, use_cache=False).logits.log_softmax(-1)
    wanted = [-logits[b, i - 1, ids[b, i]] for b in range(2) for i in range(1, ids.shape[1]) if i % 4 != 3]
    assert torch.allclose(landmark_loss(model, ids).double(), torch.stack(wanted).mean(), atol=1e-5)
    report = carry_out(conversion, [landmark_tuning(40, 3e-3)], lambda draw: ids)
    assert report.losses[0][-1] < 0.3 * report.losses[0][0]
    again = convert_landmark(llama(layers=1), 3).model
    assert again.config.landmark_token_id == 50
    conversion.restore()
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention" and convert_landmark(model, 3) and table.shape[0] == 51


@torch.no_grad()
def test_generation_puts_landmarks_where_they_belong():
    model = llama(sharp=2)
    convert_landmark(model, 4, 2)
    landmark = model.config.landmark_token_id
    prompt = with_landmarks(torch.randint(1, 50, (2, 6)), 4, landmark)
    out = model.generate(prompt, max_new_tokens=14, do_sample=False, logits_processor=[LandmarkTokens(4, landmark)])
    assert out.shape == (2, 21) and ((out == landmark) == (torch.arange(21) % 5 == 4)).all()
    for row in out:
        logits = by_hand(model, row, 4, 2)
        for at in range(7, 21):
            if at % 5 != 4:
                assert int(logits[at - 1, :landmark].argmax()) == int(row[at])


def test_what_is_refused():
    for options in ({"block": 0}, {"top_blocks": 0}):
        with pytest.raises(RegardError, match=next(iter(options))):
            convert_landmark(llama(layers=1), **options)
