"""Layers and small models around the mechanisms."""

from .attention import Attention, LayerState
from .based import GatedConv, based_mixers
from .decoder import Block, Decoder
from .memory import KeyValueMemory
from .parts import LayerScale, ShortConv, SwiGLU
from .prototypes import IDWClassifier
from .relaxed import RelaxedAttention
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
    "GatedConv",
    "IDWClassifier",
    "ISAB",
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
    "based_mixers",
    "position_embedding",
]
