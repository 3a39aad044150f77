"""biformer: the released module (padding attended, before the projection) and its refactoring for NCHW maps."""

import torch
from golden.vectors import Vectors, case

import regard


@case("c0", "c1", "c2", "c3", "c4", "c5", "c6")
def layer(v: Vectors) -> None:
    nchw = v.get("layout") == "NCHW"
    made = regard.nn.BiLevelRoutingAttention(
        v["dim"], v["num_heads"], regions=v["n_win"], top_k=v["topk"], qk_dim=v.get("qk_dim"), lepe=v["side_dwconv"],
        soft=v.get("soft_routing", False), differentiable=v.get("diff_routing", False), param_routing=v.get("param_routing", False),
        auto_pad=v.get("auto_pad", False), padded="attended", layout="nchw" if nchw else "nhwc",
    ).to(v.dtype)  # fmt: skip
    qkv, out = ("qkv_linear", "output_linear") if nchw else ("qkv.qkv", "wo")
    for into, name in ((made.qkv, qkv), (made.out, out)):
        v.put(into.weight, v(f"{name}.weight").flatten(1))
        v.put(into.bias, f"{name}.bias")
    v.load(made, {"lepe": "lepe"} | ({"router": "router.emb"} if v.get("param_routing") else {}))
    x = v.leaf("x")
    y = made(x)
    v.same(y, "out")
    grads = torch.autograd.grad((y * v("w")).sum(), [x, made.qkv.weight])
    v.same(grads[0], "dx", v.grad)
    if v.has("d_qkv.qkv.weight"):
        v.same(grads[1], "d_qkv.qkv.weight", v.grad)
    want = v("route_idx").long()
    assert torch.equal(made.routes.sort(-1).values.reshape(want.shape), want.sort(-1).values)
    if v.has("route_weight"):
        v.same(made.route_logits.gather(-1, made.routes).softmax(-1), "route_weight")
