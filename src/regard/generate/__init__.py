"""Several tokens a pass: drafts of what comes next, verified by the model at once; the output is that of plain decoding."""

from ..nn.images.timm_host import operators
from .accept import Greedy, Sampled, Typical
from .beams import Beam, beam_search
from .host import Host, Seen
from .loop import Generation, generate
from .state import State, Strategy
from .strategies import DraftModel, Plain, PromptLookup, made, named
from .tree import Draft, Shape, chain

operators()  # transformers reads torchvision where it is installed

__all__ = [
    "Beam",
    "Draft",
    "DraftModel",
    "Generation",
    "Greedy",
    "Host",
    "Plain",
    "PromptLookup",
    "Sampled",
    "Seen",
    "Shape",
    "State",
    "Strategy",
    "Typical",
    "beam_search",
    "chain",
    "generate",
    "made",
    "named",
]
