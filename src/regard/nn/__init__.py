"""Layers and small models around the mechanisms."""

from typing import Any

from ..lazy import listed, load
from .attention import Attention, LayerState
from .codes import Codebook
from .compressed_sparse import NSAAttention
from .decoder import Block, Decoder
from .ema import MultiHeadEMA
from .grid import Dress, GridAttention, GridBlock, GridNet, LocalConcentration, WindowAttention
from .mixers import mixer, mixer_names
from .parts import LayerScale, ShortConv, SwiGLU

# Rows of the zoo under their public names, each loaded when it is first asked for.
ROWS = {
    "AdaptiveFilterAttention": "linear.afa",
    "AgentAttention": "linear.agent_attention",
    "GatedConv": "linear.based",
    "based_mixers": "linear.based",
    "EfficientAttention": "linear.efficient_attention",
    "FNetMixer": "linear.fftnet",
    "SpectralEncoder": "linear.fftnet",
    "SpectralMixer": "linear.fftnet",
    "OperatorAttention": "linear.galerkin",
    "OperatorModel": "linear.galerkin",
    "BudgetController": "linear.lalte",
    "LTEAttention": "linear.lalte",
    "lalte_layers": "linear.lalte",
    "AxisMixing": "linear.lightnet",
    "LightNet": "linear.lightnet",
    "LongVQBlock": "linear.longvq",
    "MegaLayer": "linear.mega",
    "Experts": "linear.minimax_01",
    "MiniMaxConfig": "linear.minimax_01",
    "MiniMaxLike": "linear.minimax_01",
    "SEAAttention": "linear.sea",
    "PRepBN": "linear.slab",
    "RepBN": "linear.slab",
    "SoftmaxFreeAttention": "linear.soft",
    "VQAttention": "linear.transformer_vq",
    "BiGLA2D": "linear.vig",
    "ViG": "linear.vig",
    "both_directions": "linear.vig",
    "KeyValueBias": "softmax.attention_sink",
    "DualAttention": "softmax.dat",
    "PositionalSymbols": "softmax.dat",
    "RelationalAttention": "softmax.dat",
    "RelationalCrossAttention": "softmax.dat",
    "RelativeSymbols": "softmax.dat",
    "SymbolicAttention": "softmax.dat",
    "GaussianAdaptiveAttention": "softmax.gaam",
    "GaussianBlock": "softmax.gaam",
    "importance_factor": "softmax.gaam",
    "GINAttention": "softmax.gin_attention",
    "PNAAttention": "softmax.gin_attention",
    "SparseGINAdapter": "softmax.gin_attention",
    "GraphTransformer": "softmax.graph_transformer",
    "GraphTransformerLayer": "softmax.graph_transformer",
    "laplacian_positions": "softmax.graph_transformer",
    "IDWClassifier": "softmax.idw_attention",
    "MonotonicDecoder": "softmax.latent_monotonic_attention",
    "MultiTokenAttention": "softmax.mta",
    "RelativeConvMHA": "softmax.rcmha",
    "RelaxedAttention": "softmax.relaxed_attention",
    "KeyValueMemory": "softmax.reluformer",
    "attention_mass": "softmax.rnope",
    "rnope_layers": "softmax.rnope",
    "FrugalAttention": "softmax.super_attention",
    "TaylorShiftAttention": "softmax.taylorshift",
    "TropicalAttention": "softmax.tropical_attention",
    "TropicalLinear": "softmax.tropical_attention",
    "maxplus_matmul": "softmax.tropical_attention",
    "LatentAlignment": "softmax.variational_attention",
    "GlobalLatentAttention": "sparse.alternating_sparse_attention",
    "LocalLatentAttention": "sparse.alternating_sparse_attention",
    "asa_layers": "sparse.alternating_sparse_attention",
    "BiFormer": "sparse.biformer",
    "BiFormerBlock": "sparse.biformer",
    "BiLevelRoutingAttention": "sparse.biformer",
    "DemonstrationCache": "sparse.dbsa",
    "DynamicMaskAttention": "sparse.dma",
    "SwinWindowAttention": "sparse.flash_window_attention",
    "FluxAttention": "sparse.flux_attention",
    "flux_model": "sparse.flux_attention",
    "NeighborhoodAttention2D": "sparse.fused_neighborhood",
    "HaloAttention2d": "sparse.halonet",
    "HaloNet": "sparse.halonet",
    "ReusedIndices": "sparse.hylra",
    "LandmarkAttention": "sparse.landmark_attention",
    "SALAConfig": "sparse.minicpm_sala",
    "build_sala": "sparse.minicpm_sala",
    "MoSA": "sparse.mosa",
    "NAtSAttention": "sparse.nats",
    "RecurrentMemoryBlock": "sparse.recurrent_memory_transformer",
    "RoutingAttention": "sparse.routing_transformer",
    "AttnGate": "sparse.seerattention",
    "SeerAttention": "sparse.seerattention",
    "SparseLinearAttention": "sparse.sla",
    "SparseBlock": "sparse.sparse_transformer",
    "position_embedding": "sparse.sparse_transformer",
    "SparsifinerAttention": "sparse.sparsifiner",
    "SSAAttention": "sparse.ssa",
    "SuperlinearAttention": "sparse.superlinear_attention",
    "CBAM": "vision.cbam",
    "CoordinateAttention": "vision.ela",
    "ELA": "vision.ela",
    "PolarizedSelfAttention": "vision.polarized_attention",
    "ISAB": "vision.set_transformer",
    "MAB": "vision.set_transformer",
    "PMA": "vision.set_transformer",
    "SAB": "vision.set_transformer",
    "SetTransformer": "vision.set_transformer",
    "ULSAM": "vision.ulsam",
}

__all__ = ["Attention", "Block", "Codebook", "Decoder", "Dress", "GridAttention", "GridBlock", "GridNet", "LayerScale", "LayerState", "LocalConcentration", "MultiHeadEMA", "NSAAttention", "ShortConv", "SwiGLU", "WindowAttention", "mixer", "mixer_names", *ROWS]


def __getattr__(name: str) -> Any:
    return load(__name__, ROWS, name)


def __dir__() -> list[str]:
    return listed(globals(), ROWS)
