"""Layers and small models around the mechanisms."""

from .attention import Attention, LayerState
from .based import GatedConv, based_mixers
from .decoder import Block, Decoder
from .frugal import FrugalAttention
from .gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from .key_bias import KeyValueBias
from .memory import KeyValueMemory
from .parts import LayerScale, ShortConv, SwiGLU
from .prototypes import IDWClassifier
from .relaxed import RelaxedAttention
from .rnope import attention_mass, rnope_layers
from .routing import RoutingAttention
from .set_transformer import ISAB, MAB, PMA, SAB, SetTransformer
from .sparse_block import SparseBlock, position_embedding
from .taylorshift import TaylorShiftAttention
from .vision import AgentAttention, SoftmaxFreeAttention

__all__ = [
    "AgentAttention",
    "Attention",
    "Block",
    "Decoder",
    "FrugalAttention",
    "GatedConv",
    "GaussianAdaptiveAttention",
    "GaussianBlock",
    "IDWClassifier",
    "ISAB",
    "KeyValueBias",
    "KeyValueMemory",
    "LayerScale",
    "LayerState",
    "MAB",
    "PMA",
    "RelaxedAttention",
    "RoutingAttention",
    "SAB",
    "SetTransformer",
    "ShortConv",
    "SoftmaxFreeAttention",
    "SparseBlock",
    "SwiGLU",
    "TaylorShiftAttention",
    "attention_mass",
    "based_mixers",
    "importance_factor",
    "position_embedding",
    "rnope_layers",
]
