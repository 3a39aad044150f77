"""Whether a gate carries what one side of an image shows to the other: a one-block net with it in the slot."""

from __future__ import annotations

from regard.lab.checks.shared.training import accuracy, middle, trained
from regard.nn.images.slot_net import Slot, SlotNet
from regard.tasks.images import distant_signs


def sign_accuracy(slot: Slot | None) -> float:
    """Median over three seeds after 80 steps; fields of the net without a slot are 7 pixels wide, so that it stays near 3/4 at best."""

    def run(seed: int) -> float:
        net = trained(lambda: SlotNet(2, 2, slot, widths=(16,)), distant_signs, 80, seed=seed, lr=1e-2, batch=32)
        return accuracy(net, distant_signs)

    return middle(run)
