"""Path patching on transformers models, and what it refuses."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import regard  # noqa: E402
from regard.interpret import activation_patch, head_weights, logit_difference, path_patch, written  # noqa: E402
from regard.taps import sites  # noqa: E402
from regard.tasks.prompts import colored_objects, indirect_object  # noqa: E402


def built(kind, **more):
    torch.manual_seed(0)
    base = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "gpt2":
        base = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **base, **more)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_all_heads_and_mlps_held_leave_only_the_sender(kind):
    model, prompts = built(kind), indirect_object(4, 20, torch.Generator().manual_seed(0))
    metric = logit_difference(prompts.answers)
    groups = [[(layer, head) for layer in range(2) for head in range(4)]]
    free = path_patch(model, prompts.clean, prompts.corrupt, metric, senders=groups).scores
    frozen = path_patch(model, prompts.clean, prompts.corrupt, metric, senders=groups, freeze_mlp=True).scores
    assert float(free[0, 0]) == pytest.approx(1, abs=1e-3)  # the last token is the same: heads carry all that differs
    assert not torch.allclose(free, frozen)
    own = activation_patch(model, prompts.clean, prompts.corrupt, metric, heads=[(1, 2)], position=-1).scores
    assert float(own[1, 2]) == pytest.approx(
        float(path_patch(model, prompts.clean, prompts.corrupt, metric, senders=[(1, 2)]).scores[1, 2]), abs=1e-4
    )
    with regard.taps(model, ["heads", "out"]) as seen, torch.no_grad():
        model(prompts.clean)
    for site in sites(model):
        whole = written(site, seen["heads", site.layer]).sum(1) + head_weights(site).bo
        torch.testing.assert_close(whole, seen["out", site.layer], rtol=1e-4, atol=1e-5)


def test_matrices_of_heads_give_queries_and_keys():
    model = built("gpt2")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with regard.taps(model, ["q", "k", "v", "residual_in"]) as seen, torch.no_grad():
        model(torch.randint(40, (2, 7)))
    for site in sites(model):
        w, block = head_weights(site), model.transformer.h[site.layer]
        x = block.ln_1(seen["residual_in", site.layer])
        for name, matrix, bias in (("q", w.wq, w.bq), ("k", w.wk, w.bk), ("v", w.wv, w.bv)):
            made = torch.einsum("bld,hde->bhle", x, matrix) + bias[:, None]
            torch.testing.assert_close(made, seen[name, site.layer], rtol=1e-4, atol=1e-4)
    with pytest.raises(regard.RegardError, match="holds its projections"):
        head_weights(
            sites(
                transformers.GPTNeoXModel(
                    transformers.GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=9)
                )
            )[0]
        )


def test_bad_input_is_refused():
    model, prompts = built("llama", num_key_value_heads=2, head_dim=8), indirect_object(4, 20, torch.Generator().manual_seed(0))
    clean, corrupt, metric = prompts.clean, prompts.corrupt, logit_difference(prompts.answers)
    for options, message in (
        ({"component": "o"}, "component"),
        ({"receivers": [(2, 0)]}, "heads holds"),
        ({"receivers": [(1, 0)], "component": "v"}, "share their keys"),
        ({"position": 30}, "positions"),
    ):
        with pytest.raises(regard.RegardError, match=message):
            path_patch(model, clean, corrupt, metric, **options)
    with pytest.raises(regard.RegardError, match="one shape"):
        path_patch(model, clean, corrupt[:, 1:], metric)
    with pytest.raises(regard.RegardError, match="the same on clean"):
        path_patch(model, clean, clean, metric)
    for call in (lambda: indirect_object(2, 2, torch.Generator()), lambda: colored_objects(2, 2, 3, torch.Generator())):
        with pytest.raises(regard.RegardError, match="3 or more"):
            call()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
