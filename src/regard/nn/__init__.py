"""Layers and small models around the mechanisms."""

from .attention import Attention, LayerState
from .based import GatedConv, based_mixers
from .decoder import Block, Decoder
from .memory import KeyValueMemory
from .parts import LayerScale, ShortConv, SwiGLU
from .prototypes import IDWClassifier
from .routing import RoutingAttention
from .set_transformer import ISAB, MAB, PMA, SAB, SetTransformer
from .sparse_block import SparseBlock, position_embedding
from .vision import AgentAttention, SoftmaxFreeAttention

__all__ = [
    "AgentAttention",
    "Attention",
    "Block",
    "Decoder",
    "GatedConv",
    "IDWClassifier",
    "ISAB",
    "KeyValueMemory",
    "LayerScale",
    "LayerState",
    "MAB",
    "PMA",
    "RoutingAttention",
    "SAB",
    "SetTransformer",
    "ShortConv",
    "SoftmaxFreeAttention",
    "SparseBlock",
    "SwiGLU",
    "based_mixers",
    "position_embedding",
]
