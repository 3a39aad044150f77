"""Layers and small models around the mechanisms."""

from .aligned_sparse import SSAAttention
from .alignment import LatentAlignment
from .alternating import GlobalLatentAttention, LocalLatentAttention, asa_layers
from .attention import Attention, LayerState
from .based import GatedConv, based_mixers
from .bigla import BiGLA2D, ViG, both_directions
from .bilevel import BiFormerBlock, BiLevelRoutingAttention
from .codes import Codebook, LongVQBlock, VQAttention
from .compressed_sparse import NSAAttention
from .decoder import Block, Decoder
from .demonstrations import DemonstrationCache
from .dynamic_mask import DynamicMaskAttention
from .efficient import EfficientAttention
from .estimated import SEAAttention
from .eviction import BudgetController, LTEAttention, lalte_layers
from .filter import AdaptiveFilterAttention
from .frugal import FrugalAttention
from .gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from .graph_transformer import GraphTransformer, GraphTransformerLayer, laplacian_positions
from .grid import Dress, GridAttention, GridBlock, GridNet, LocalConcentration, WindowAttention
from .halo import HaloAttention2d, HaloNet
from .infllm import SALAConfig, build_sala
from .isomorphic import GINAttention, PNAAttention, SparseGINAdapter
from .key_bias import KeyValueBias
from .landmark import LandmarkAttention
from .layer_router import FluxAttention, flux_model
from .lifetimes import NAtSAttention
from .lightnet import AxisMixing, LightNet
from .mega import MegaLayer, MultiHeadEMA
from .memory import KeyValueMemory
from .minimax import Experts, MiniMaxConfig, MiniMaxLike
from .mixers import mixer, mixer_names
from .monotonic import MonotonicDecoder
from .mosa import MoSA
from .multi_token import MultiTokenAttention
from .neighborhood import NeighborhoodAttention2D
from .operator import OperatorAttention, OperatorModel
from .parts import LayerScale, ShortConv, SwiGLU
from .prepbn import PRepBN, RepBN
from .prototypes import IDWClassifier
from .recurrent_memory import RecurrentMemoryBlock
from .relational import (
    DualAttention,
    PositionalSymbols,
    RelationalAttention,
    RelationalCrossAttention,
    RelativeSymbols,
    SymbolicAttention,
)
from .relative_conv import RelativeConvMHA
from .relaxed import RelaxedAttention
from .reused_indices import ReusedIndices
from .rnope import attention_mass, rnope_layers
from .routing import RoutingAttention
from .seer import AttnGate, SeerAttention
from .set_transformer import ISAB, MAB, PMA, SAB, SetTransformer
from .sparse_block import SparseBlock, position_embedding
from .sparse_linear import SparseLinearAttention
from .sparsifiner import SparsifinerAttention
from .spectral import FNetMixer, SpectralEncoder, SpectralMixer
from .superlinear import SuperlinearAttention
from .swin import SwinWindowAttention
from .taylorshift import TaylorShiftAttention
from .tropical import TropicalAttention, TropicalLinear, maxplus_matmul
from .vision import AgentAttention, SoftmaxFreeAttention

__all__ = [
    "ISAB",
    "MAB",
    "PMA",
    "SAB",
    "AdaptiveFilterAttention",
    "AgentAttention",
    "Attention",
    "AttnGate",
    "AxisMixing",
    "BiFormerBlock",
    "BiGLA2D",
    "BiLevelRoutingAttention",
    "Block",
    "BudgetController",
    "Codebook",
    "Decoder",
    "DemonstrationCache",
    "Dress",
    "DualAttention",
    "DynamicMaskAttention",
    "EfficientAttention",
    "Experts",
    "FNetMixer",
    "FluxAttention",
    "FrugalAttention",
    "GINAttention",
    "GatedConv",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "GlobalLatentAttention",
    "GraphTransformer",
    "GraphTransformerLayer",
    "GridAttention",
    "GridBlock",
    "GridNet",
    "HaloAttention2d",
    "HaloNet",
    "IDWClassifier",
    "KeyValueBias",
    "KeyValueMemory",
    "LTEAttention",
    "LandmarkAttention",
    "LatentAlignment",
    "LayerScale",
    "LayerState",
    "LightNet",
    "LocalConcentration",
    "LocalLatentAttention",
    "LongVQBlock",
    "MegaLayer",
    "MiniMaxConfig",
    "MiniMaxLike",
    "MoSA",
    "MonotonicDecoder",
    "MultiHeadEMA",
    "MultiTokenAttention",
    "NAtSAttention",
    "NSAAttention",
    "NeighborhoodAttention2D",
    "OperatorAttention",
    "OperatorModel",
    "PNAAttention",
    "PRepBN",
    "PositionalSymbols",
    "RecurrentMemoryBlock",
    "RelationalAttention",
    "RelationalCrossAttention",
    "RelativeConvMHA",
    "RelativeSymbols",
    "RelaxedAttention",
    "RepBN",
    "ReusedIndices",
    "RoutingAttention",
    "SALAConfig",
    "SEAAttention",
    "SSAAttention",
    "SeerAttention",
    "SetTransformer",
    "ShortConv",
    "SoftmaxFreeAttention",
    "SparseBlock",
    "SparseGINAdapter",
    "SparseLinearAttention",
    "SparsifinerAttention",
    "SpectralEncoder",
    "SpectralMixer",
    "SuperlinearAttention",
    "SwiGLU",
    "SwinWindowAttention",
    "SymbolicAttention",
    "TaylorShiftAttention",
    "TropicalAttention",
    "TropicalLinear",
    "VQAttention",
    "ViG",
    "WindowAttention",
    "asa_layers",
    "attention_mass",
    "based_mixers",
    "both_directions",
    "build_sala",
    "flux_model",
    "importance_factor",
    "lalte_layers",
    "laplacian_positions",
    "maxplus_matmul",
    "mixer",
    "mixer_names",
    "position_embedding",
    "rnope_layers",
]
