"""What an attention is: immutable descriptions that own no tensors and know no device."""

from .feature_map import FeatureMap, JointMap, elu_plus_one, favor, hedgehog, identity, taylor
from .key_time import Lifetime, Since
from .local import LocalLinear
from .mask import Both, Either, Full, Mask, PerHead, Where, Without, as_mask
from .mechanism import Clustered, Hybrid, Mechanism, Nystrom, Program, Recipe, Recurrent, Relayed, Weighted
from .neighborhood import Neighborhood
from .normalizer import Normalizer, RowLocal, Sinkhorn, softmax, softmax_plus, with_sinks
from .pairings import Network, Phase, Relative
from .part import Bound, Headwise, Input, Learned, Part, Projected, Sizes, bind
from .permute import Permutation
from .position import Alibi, Bias, Chain, Harmonic, Modified, Position, RelativeBias, Rope, Softcap
from .position_mask import BlockPowers, Causal, Columns, Dilated, FixedBlock, Prefix, Sinks, Strided, Window
from .rows import RowWise, row_count, row_max, row_mean, row_softmax, row_sum
from .score import Additive, Cosine, Distance, Dot, Pairwise, Score
from .select import Chosen, Selection, Selector, TopBlocks, View
from .states import LogLinear, Slots
from .thresholds import ActiveTiles
from .token_mask import Explicit, Kept, Padding, Segments

__all__ = [
    "ActiveTiles",
    "Additive",
    "Alibi",
    "Bias",
    "BlockPowers",
    "Both",
    "Bound",
    "Causal",
    "Chain",
    "Chosen",
    "Clustered",
    "Columns",
    "Cosine",
    "Dilated",
    "Distance",
    "Dot",
    "Either",
    "Explicit",
    "FeatureMap",
    "FixedBlock",
    "Full",
    "Harmonic",
    "Headwise",
    "Hybrid",
    "Input",
    "JointMap",
    "Kept",
    "Learned",
    "Lifetime",
    "LocalLinear",
    "LogLinear",
    "Mask",
    "Mechanism",
    "Modified",
    "Neighborhood",
    "Network",
    "Normalizer",
    "Nystrom",
    "Padding",
    "Pairwise",
    "Part",
    "PerHead",
    "Permutation",
    "Phase",
    "Position",
    "Prefix",
    "Program",
    "Projected",
    "Recipe",
    "Recurrent",
    "Relative",
    "RelativeBias",
    "Relayed",
    "Rope",
    "RowLocal",
    "RowWise",
    "Score",
    "Segments",
    "Selection",
    "Selector",
    "Since",
    "Sinkhorn",
    "Sinks",
    "Sizes",
    "Slots",
    "Softcap",
    "Strided",
    "TopBlocks",
    "View",
    "Weighted",
    "Where",
    "Window",
    "Without",
    "as_mask",
    "bind",
    "elu_plus_one",
    "favor",
    "hedgehog",
    "identity",
    "row_count",
    "row_max",
    "row_mean",
    "row_softmax",
    "row_sum",
    "softmax",
    "softmax_plus",
    "taylor",
    "with_sinks",
]
