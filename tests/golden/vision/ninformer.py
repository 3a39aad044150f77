"""NiNformer's block and gating unit."""

from __future__ import annotations

from golden.vectors import Vectors, case

from regard.zoo.vision.ninformer import MixerGatingUnit, NiNBlock

MIXER = (("mixer", "Mixer"), ("token_norm", "token_mix.0"), ("token_mlp", "token_mix.2.net"), ("channel_norm", "channel_mix.0"))
MIXER += (("channel_mlp", "channel_mix.1.net"),)


@case("b0", "b1")
def block(g: Vectors) -> None:
    made = NiNBlock(g["dim"], g["tokens"], g["hidden"]).to(g.dtype)
    g.layer(made, **g.fill(made, ("unit", "mgu"), (r"^mlp\.", "ffn.net."), *MIXER))


@case("u0")
def unit(g: Vectors) -> None:
    made = MixerGatingUnit(g["dim"], g["tokens"], g["token_hidden"], g["channel_hidden"]).to(g.dtype)
    g.layer(made, **g.fill(made, *MIXER))
