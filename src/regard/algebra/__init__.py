"""What an attention is: immutable descriptions that own no tensors and know no device."""

from .feature_map import FeatureMap, elu_plus_one, favor, hedgehog, identity, taylor
from .mask import (
    Both,
    Causal,
    Columns,
    Dilated,
    Either,
    Explicit,
    FixedBlock,
    Full,
    Mask,
    Padding,
    PerHead,
    Prefix,
    Segments,
    Sinks,
    Strided,
    Where,
    Window,
    Without,
    as_mask,
)
from .mechanism import Clustered, Hybrid, Mechanism, Nystrom, Recipe, Recurrent, Relayed, Weighted
from .neighborhood import Neighborhood
from .normalizer import Normalizer, RowLocal, Sinkhorn, softmax, softmax_plus
from .part import Bound, Input, Learned, Part, Projected, Sizes, bind
from .position import Alibi, Modified, Position, RelativeBias, Rope
from .score import Additive, Cosine, Distance, Dot, Pairwise, Score
from .select import Chosen, Selection, Selector, TopBlocks

__all__ = [
    "Additive", "Alibi", "Both", "Bound", "Causal", "Chosen", "Clustered", "Columns", "Cosine", "Dilated", "Distance", "Dot", "Either", "Explicit",
    "FeatureMap", "FixedBlock", "Full", "Hybrid", "Input", "Learned", "Mask", "Mechanism", "Modified", "Neighborhood", "Normalizer", "Nystrom",
    "Padding", "Pairwise", "Part", "PerHead", "Position", "Prefix", "Projected", "Recipe", "Recurrent", "Relayed", "RelativeBias", "Rope",
    "RowLocal", "Score", "Segments", "Selection", "Selector", "Sinkhorn", "Sinks", "Sizes", "Strided", "TopBlocks", "Weighted",
    "Where", "Window", "Without", "as_mask", "bind", "elu_plus_one", "favor", "hedgehog", "identity", "softmax", "softmax_plus", "taylor",
]
