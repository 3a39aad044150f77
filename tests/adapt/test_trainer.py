"""Training of patched models by the ecosystem's loops."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import loops  # noqa: E402

from regard import adapt  # noqa: E402


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, at):
        ids = torch.arange(at, at + 9) % 90 + 3
        keep = torch.ones(9, dtype=torch.long)
        keep[: at % 4] = 0
        return {"input_ids": ids, "attention_mask": keep, "labels": ids}


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "hedgehog", "entmax"])
def test_trainer_in_bfloat16(name, tmp_path):
    model = loops.llama(num_hidden_layers=1)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    options = {"bf16": True, "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no"}
    with adapt.patch(model, name) as patch:
        trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), **options), train_dataset=Rows())
        loss = trainer.train().training_loss
    assert loss == loss and patch.when == "both"
    moved = [key for key, x in model.state_dict().items() if not torch.equal(x, before[key])]
    assert any("q_proj" in key for key in moved) and all(x.isfinite().all() for x in model.state_dict().values())


def test_accelerate_prepares_a_patched_model():
    from accelerate import Accelerator

    model = loops.llama(num_hidden_layers=1)
    with adapt.patch(model, "sigmoid"):
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        out = prepared(Rows()[1]["input_ids"][None], labels=Rows()[1]["labels"][None])
        out.loss.backward()
    assert out.loss.isfinite() and model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
