"""The turns of rotary positions, as the model itself makes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import taps


@torch.no_grad()
def turns_of(model: nn.Module, ids: Tensor) -> dict[int, Tensor]:
    """For the row ids (1, L): {layer: T (L, d, d)} with q = q_pre_rotary @ T[token], of the layers that have rotary positions.

    Found by giving the model each channel alone: one pass over d copies of the row. Channels that are not turned come out as they went in.
    """
    turned = [site for site in taps.sites(model) if site.unturned is None]
    if not turned:
        return {}
    layers = [site.layer for site in turned]
    with taps.read(model, ["q_pre_rotary", "q"], layers=layers, heads=[0]) as seen:
        model(ids)
    found: dict[int, Tensor] = {}
    for width in {seen["q", layer].shape[-1] for layer in layers}:
        own = [layer for layer in layers if seen["q", layer].shape[-1] == width]
        channels = torch.eye(width, dtype=seen["q", own[0]].dtype, device=ids.device)

        def alone(x: Tensor, channels: Tensor = channels) -> Tensor:
            return channels[: x.shape[0], None, None, : x.shape[-1]].expand_as(x)

        with taps.edit(model, {"q_pre_rotary": alone}, layers=own), taps.read(model, ["q_pre_rotary", "q"], layers=own, heads=[0]) as made:
            model(ids.expand(width, -1))
        for layer in own:
            given = made["q_pre_rotary", layer].shape[-1]
            turn = channels.expand(ids.shape[1], -1, -1).clone()
            turn[:, :given] = made["q", layer][:given, 0].transpose(0, 1)
            turn[:, :given, given:] = 0.0  # what passes beside the turned channels is the row's own
            found[layer] = turn
    return found
