"""Star Attention over processes equals virtual hosts, and what it cannot run is said."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import regard
from regard import RegardError
from regard.nn import Decoder
from regard.parallel import ProcessHosts, star_decode, star_prefill

COUNT = 2


def answers(hosts):
    torch.manual_seed(0)
    model, ids = Decoder(vocab=40, dim=32, layers=2, heads=4, kv_heads=2).double().eval(), torch.randint(40, (2, 60))
    state = star_prefill(model, ids[:, :50], 16, 8, hosts=hosts)
    parts = [star_decode(state, ids[:, 50:55])]
    return torch.cat(parts + [star_decode(state, ids[:, t : t + 1]) for t in range(55, 60)], 1), state.sent


def host(rank, meeting, found):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=COUNT)
    out, sent = answers(ProcessHosts())
    torch.save({"out": out, "sent": sent}, f"{found}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_processes_equal_virtual_hosts(tmp_path):
    mp.spawn(host, (tmp_path / "meeting", tmp_path), nprocs=COUNT)
    truth, sent = answers(COUNT)
    for rank in range(COUNT):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.allclose(found["out"], truth, atol=1e-12) and found["sent"] == sent


def test_only_full_softmax_attention():
    model = Decoder(vocab=40, dim=32, layers=1, heads=4, mechanism="gla")
    with pytest.raises(RegardError, match="full softmax attention"):
        star_prefill(model, torch.randint(40, (1, 20)), 8)
    with pytest.raises(RegardError, match="0 <= anchor <= block"):
        star_prefill(Decoder(vocab=40, dim=32, layers=1, heads=4), torch.randint(40, (1, 20)), 8, 9)
    assert "star-attention" in regard.names("module")
