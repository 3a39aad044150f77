"""Hedgehog: learned feature maps that mimic softmax's spiky, monotone weights (id 38; Zhang et al., 2024).

phi(x) = [softmax_d(W x + b), softmax_d(-W x - b)],   W per head, from the identity; a_ij = phi_q(q_i).phi_k(k_j) / sum_j
Fine-tuning by LoRA behind distillation: `carry_out(convert(model, "hedgehog"), [Transfer(...), Lora(targets=("attention.q", "attention.v"), ...)], draw)`.
"""

from regard.algebra import Recurrent
from regard.algebra import hedgehog as hedgehog_map
from regard.catalog.registry import register


@register("hedgehog")
def hedgehog(form: str = "softmax", clamp: float = 1e-12, eps: float = 1e-12, divide: str = "add") -> Recurrent:
    """form: "softmax" (the stable practical map), "half" (its first half alone), "exp", [exp(Wx + b), exp(-Wx - b)], or "exp_shifted", the same
    with each half over its largest channel, for keys too. clamp: smallest feature value. divide: by the sum plus eps ("add", as released)
    or at least eps ("sum"). Inputs `query_map`, `key_map` (H, F, D), `query_shift`, `key_shift` (H,), one number a head."""
    return Recurrent(hedgehog_map(form, clamp), readout=divide, eps=eps, scaled=False)
