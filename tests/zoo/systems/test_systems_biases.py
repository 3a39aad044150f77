"""Which linear layers have biases, as the papers' models say."""

import pytest
from torch import nn

pytest.importorskip("transformers")
from regard.lab.checks.shared.decoding import llama
from regard.zoo.analysis import (
    abrupt_icl,
    active_dormant_heads,
    deceptive_attention,
    dsf,
    filter_and_store,
    graph_attention_windows_in_llms,
    mha_memorization_capacity,
    rank_one_universal,
)
from regard.zoo.systems import (
    bipft,
    block_transformer,
    chunked_tabpfn,
    hgf,
    lama,
    lina_speech,
    medusa,
    mla_moe_intensity,
    mqsa_ted,
    ring_self_attention,
)

# the model, and which of its own linear layers (those of shared parts left out) have none
BARE = {
    "abrupt-icl": (abrupt_icl.InductionNet(4, 2), {f"{name}.{at}" for name in "qkv" for at in range(2)}),
    "active-dormant-heads": (active_dormant_heads.BackcopyModel(9, 8), {"out"}),
    "bipft": (bipft.BinaryBert(9, 8, 1, 2), set()),
    "block-transformer": (block_transformer.BlockTransformerLM(9, 2, 8, 1, 1, 2), {"head"}),
    "chunked-tabpfn": (chunked_tabpfn.TabPFNLite(dim=8, heads=2, layers=1), set()),
    "deceptive-attention": (deceptive_attention.EmbAttention(9, 8), {"attention.outer"}),
    "deceptive-attention translator": (deceptive_attention.Translator(9, 8), {"query"}),
    "deceptive-attention transformer": (deceptive_attention.ClsTransformer(9, 8, 2), set()),
    "dsf": (dsf.Recaller([nn.Identity()], 8, 9, 5), {"head"}),
    "filter-and-store": (filter_and_store.FilterStore(9, 4), {"kq", "value"}),
    "graph-attention-windows-in-llms": (graph_attention_windows_in_llms.WindowedDecoder(9, 2), set()),
    "hgf": (hgf.HGFDecoder(9, 8, 1, 2), {"head"}),
    "lama": (lama.LAMAClassifier(9, 2, 4, 4, 2), set()),
    "lina-speech": (lina_speech.LinaLM(9, 5, 2, 16, 2, 1, 1), {"heads.0", "heads.1"}),
    "medusa": (medusa.Medusa(llama(), 2), {"heads.0.1", "heads.1.1"}),
    "mha-memorization-capacity": (mha_memorization_capacity.MemoryAttention(6, 2, model_dim=5), {"out"}),
    "mla-moe-intensity": (mla_moe_intensity.LatentAttention(8, 2, 4, 4, 4), {"q", "down", "out"}),
    "mqsa-ted": (mqsa_ted.MQSATED(9, 8), set()),
    "rank-one-universal": (rank_one_universal.OneLayer(3, 4, 2, 6), set()),
    "ring-self-attention": (ring_self_attention.SequenceParallelBlock(8, 2), set()),
}
SHARED = ("blocks", "layers", "reader", "before", "behind", "cross", "mixers", "mlps", "block_decoder", "token_decoder", "gate")


@pytest.mark.parametrize("slug", BARE)
def test_linear_layers_without_biases(slug):
    model, bare = BARE[slug]
    own = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[0] not in SHARED}
    assert {name for name, m in own.items() if m.bias is None} == bare


def test_attention_of_small_transformers():
    """deceptive-attention: with biases, over all tokens; graph-attention-windows-in-llms: without, where the mask lets it."""
    for model, biased in ((BARE["deceptive-attention transformer"][0], True), (BARE["graph-attention-windows-in-llms"][0], False)):
        for block in model.blocks:
            assert all((m.bias is not None) == biased for m in block.mixer.modules() if isinstance(m, nn.Linear)) and not block.mixer.causal
            assert isinstance(block.norm1, nn.LayerNorm) and {m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
