"""halonet: both public implementations. Their tables of relative places begin at the halo; here index 0 is the farthest displacement."""

import torch
from golden.vectors import Vectors, case

import regard


@case("c0", "c1", "c2", "c3", "c4", "c5", "c6")
def layer(v: Vectors) -> None:
    timm = v["impl"] == "timm"
    heads = v["num_heads"] if timm else v["heads"]
    qk, dv = (v["dim_head_qk"], v["dim_head_v"]) if timm else (v["dim_head"], v["dim_head"])
    made = regard.nn.HaloAttention2d(
        v["dim"], heads * dv if timm else v["dim"], heads, block=v["block_size"], halo=v["halo_size"], stride=v.get("stride", 1),
        head_dim=qk, value_dim=dv, masked=not timm, relative="scaled" if v.get("scale_pos_embed") or not timm else "unscaled",
        bias=v.get("qkv_bias", False), project=not timm, pool=v.get("avg_down", False), steps="queries",
    ).to(v.dtype)  # fmt: skip
    kv = v("kv.weight" if timm else "to_kv.weight").flatten(1)
    if not timm:  # all heads' k, then all heads' v
        k, value = (x.unflatten(0, (heads, -1)) for x in kv.chunk(2))
        kv = torch.cat((k, value), 1).flatten(0, 1)
        v.put(made.project.weight, v("to_out.weight")[..., None, None])
        v.put(made.project.bias, "to_out.bias")
    v.put(made.kv.weight, kv[..., None, None])
    v.put(made.q.weight, v("q.weight" if timm else "to_q.weight").flatten(1)[..., None, None])
    if v.get("qkv_bias"):
        v.put(made.q.bias, "q.bias")
        v.put(made.kv.bias, "kv.bias")
    table = "pos_embed.{}_rel" if timm else "rel_pos_emb.rel_{}"
    for into, axis in ((made.rel_h, "height"), (made.rel_w, "width")):
        v.put(into, v(table.format(axis)).roll(-v["halo_size"], 0))
    x = v.leaf("x")
    y = made(x)
    v.same(y, "out")
    v.same(torch.autograd.grad((y * v("w")).sum(), x)[0], "dx", v.grad)
