"""Mamba-YOLO's first values, options and refusals; what detection does with nothing to find and with rivals."""

import pytest
import torch

from regard import RegardError
from regard.nn.images.detection import Detect, Found, detection_loss, detections, overlap
from regard.nn.selective_scan import SelectiveScan, selective_scan
from regard.tasks.images import scenes
from regard.zoo.vision.mamba_yolo import SS2D, MambaYOLO, MambaYOLOMini, VisionClueMerge, VSSBlock, mamba_yolo


def test_first_values_and_shapes():
    torch.manual_seed(0)
    layer = SS2D(64)
    assert float(layer.scan.log_a.abs().max()) == 0 and float(layer.scan.skip.min()) == float(layer.scan.skip.max()) == 1
    assert float(layer.scan.step.std()) == pytest.approx(1, rel=0.1) and float(layer.scan.bias.std()) == pytest.approx(1, rel=0.1)
    assert layer.scan.step.shape == (4, 128, 4) and layer.scan.log_a.shape == (4, 128, 16) and layer.last.bias is layer.first.bias is None
    head = Detect((16, 24), (8, 16), 5)
    assert [float(b[-1].bias.min()) for b in head.sides] == [1, 1]
    assert float(head.scores[1][-1].bias[0]) == pytest.approx(torch.tensor(5 / 5 / 40**2).log().item())
    assert head.sides[0][0][0].weight.shape == (64, 16, 3, 3) and head.scores[1][0][0].weight.shape == (16, 24, 3, 3)
    net = MambaYOLO(2, (8, 8, 8, 8), (1, 1, 1, 1), state=2)
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-3, 0.03)}
    assert len(mamba_yolo("L", classes=3).neck[0].scans) == 2


def test_refusals():
    with pytest.raises(RegardError, match="multiples of 32"):
        MambaYOLO(2, (8, 8, 8, 8), (1, 1, 1, 1), state=2)(torch.zeros(1, 3, 48, 64))
    with pytest.raises(RegardError, match="even sides"):
        VisionClueMerge(2, 3)(torch.zeros(1, 2, 4, 5))
    with pytest.raises(RegardError, match="one value a channel"):
        VSSBlock(3, 4, state=2).train()(torch.zeros(1, 3, 1, 1))
    for options in ({"kernel": 2}, {"ratio": 0.1}):
        with pytest.raises(RegardError, match="expected an odd kernel"):
            SS2D(4, **options)
    with pytest.raises(RegardError, match="expected 4 of each"):
        MambaYOLO(2, (8, 8), (1, 1))
    with pytest.raises(RegardError, match="'T', 'B', 'L'"):
        mamba_yolo("S")
    with pytest.raises(RegardError, match="how='fast'"):
        selective_scan(*(torch.zeros(1, 2, 3),) * 2, torch.zeros(2, 4), *(torch.zeros(1, 4, 3),) * 2, how="fast")
    with pytest.raises(RegardError, match="as many of each"):
        Detect((8, 16), (8,))
    with pytest.raises(RegardError, match="expected 1 to 4"):
        scenes(1, torch.Generator(), most=5)


def test_scans_accumulate_in_float32_and_take_no_token():
    torch.manual_seed(0)
    layer, x = SelectiveScan(4, 2, state=3, how="steps"), torch.randn(2, 2, 4, 200)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and float((half - layer.float()(x)).abs().max()) < 0.1
    assert layer(x[..., :0]).shape == (2, 2, 4, 0)
    chunks = SelectiveScan(4, 2, state=3, how="chunks")
    chunks.load_state_dict(layer.state_dict())
    torch.testing.assert_close(chunks(x), layer(x), atol=1e-4, rtol=1e-4)


def test_scenes_boxes_hold_what_is_seen():
    x, (boxes, kinds) = scenes(200, torch.Generator().manual_seed(0), noise=0.0, most=3)
    assert {-1, 0, 1} == set(kinds.flatten().tolist()) and bool((kinds >= 0).any(1).all())
    axis = torch.arange(32) + 0.5
    inside = torch.zeros(200, 32, 32, dtype=bool)
    for at in range(3):
        left, top, right, bottom = (boxes[:, at, side, None] for side in range(4))
        box = ((axis >= top) & (axis <= bottom))[:, :, None] & ((axis >= left) & (axis <= right))[:, None]
        inside |= box & (kinds[:, at] >= 0)[:, None, None]
        squares = kinds[:, at] == 0
        assert bool((x.abs().amin(1) >= 0.5)[squares][box[squares]].all())
        discs = (kinds[:, at] == 1).nonzero()[:, 0].tolist()
        share = torch.tensor([float((x[n].abs().amin(0) > 0)[box[n]].float().mean()) for n in discs])
        assert float(share.mean()) == pytest.approx(torch.pi / 4, abs=0.03)
    assert float(x.abs().amax(1)[~inside].max()) == 0


def found_of(boxes, scores):
    """A `Found` whose boxes are these, all places at the centre of 100 x 100 pixels."""
    sides = torch.full((1, len(boxes), 4, 60), -1e4)
    gaps = torch.tensor([[50 - b[0], 50 - b[1], b[2] - 50, b[3] - 50] for b in boxes])
    sides.scatter_(-1, gaps[None, ..., None], 0.0)
    return Found(sides, torch.tensor(scores).logit()[None], torch.full((len(boxes), 2), 50.0), torch.ones(len(boxes)))


def test_rivals_and_faint_boxes_are_left_out():
    found = found_of(
        [(10, 10, 60, 60), (12, 10, 60, 60), (12, 10, 60, 60), (40, 40, 90, 90), (10, 10, 60, 60)],
        [[0.8, 0.1], [0.9, 0.1], [0.1, 0.7], [0.6, 0.1], [0.2, 0.1]],
    )
    one = detections(found)[0]
    assert one.labels.tolist() == [0, 1, 0] and torch.allclose(one.scores, torch.tensor([0.9, 0.7, 0.6]))
    assert one.boxes[0].tolist() == pytest.approx([12, 10, 60, 60]) and len(detections(found, most=1)[0].scores) == 1
    assert len(detections(found, iou=0.99)[0].scores) == 4 and len(detections(found, score=0.95)[0].scores) == 0
    a, b = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    assert float(overlap(a, b, complete=False)) == pytest.approx(1 / 3, abs=1e-5) and float(overlap(a, b)) < 1 / 3 - 0.05


def test_images_without_boxes():
    net = MambaYOLOMini(2, dim=8, state=2)
    found = net(torch.randn(2, 3, 16, 16))
    none = detection_loss(found, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long))
    same = detection_loss(found, torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    assert float(none.detach()) == pytest.approx(float(same.detach()), rel=1e-5) and float(none.detach()) > 0
    none.backward()
    with pytest.raises(RegardError, match=r"expected \(B=2, M, 4\)"):
        detection_loss(found, torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.long))


def test_second_derivatives():
    torch.manual_seed(0)
    layer = SS2D(3, state=2, rank_ratio=1.0).double()
    x = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)
