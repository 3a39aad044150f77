"""Packed documents, which transformers tells by position_ids alone, are refused where attention would join them."""

import pytest
import torch

from regard import RegardError
from regard.cache import StreamingLLM
from regard.lab.checks.shared.decoding import llama
from regard.zoo.systems.sinklora import sf_training


def test_packed_documents_are_refused_and_plain_positions_are_not():
    model, ids = llama(), torch.randint(1, 50, (2, 16))
    plain = torch.arange(16).expand(2, -1)
    packed = plain.clone()
    packed[1, 8:] -= 8
    for what in (sf_training(model), StreamingLLM(1.0)(model)):
        with what:
            model(input_ids=ids, position_ids=plain + 3, use_cache=False)
            with pytest.raises(RegardError, match="one text a row"):
                model(input_ids=ids, position_ids=packed, use_cache=False)
    assert model(input_ids=ids, position_ids=packed, use_cache=False).logits.isfinite().all()
