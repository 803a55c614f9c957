"""What a user writes with the public API; tests/test_typing.py lets mypy read it as a file outside of mmfast."""

import torch
from torch import Tensor, nn
from typing_extensions import assert_type  # comes with torch; in typing from Python 3.11 on

import mmfast as mf


class Shortest(mf.Resolver):
    def forward(self, G: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.nn.functional.one_hot(G.diagonal(dim1=-2, dim2=-1).argmin(-1), G.shape[-1]).double()


grads: list[Tensor] = [torch.randn(4, 10) for _ in range(3)]
rows = torch.randn(3, 4, 10)
G = mf.gram(grads, per="sample", mask=torch.ones(3, dtype=torch.bool), backend="auto")
assert_type(G, Tensor)
assert_type(mf.gram(rows), Tensor)
assert_type(mf.weights(G, mf.UPGrad(pref=[1.0, 2.0, 3.0]), preserve_norm=True), Tensor)
assert_type(mf.combine(rows, torch.ones(3)), Tensor)
assert_type(mf.resolve([grads[0], None, grads[2]], "mgda"), Tensor)
for rule in (mf.CAGrad, mf.CAGrad(c=0.4, rescale=1), mf.resolver("cagrad", c=0.4), Shortest, Shortest(), "upgrad"):
    mf.resolve(tuple(grads), rule, per="batch_sum", preserve_norm=True)
print(mf.explain(grads, mf.MGDA, bandwidth=20.0).floor_us)
assert_type(mf.backends(), dict[str, tuple[bool, str]])

y = torch.randn(8, 10, requires_grad=True)
assert_type(mf.fork(y, 2, mf.PCGrad), tuple[Tensor, ...])
block = mf.ImpartialityBlock(
    nn.ModuleDict({"a": nn.Linear(10, 1), "b": nn.Linear(10, 2)}),
    mf.Compose("gradvac", mf.MGDA, mf.CRMOGM(mf.NashMTL(max_norm=1.0), alpha=0.5)),
    local=mf.StandardScale(torch.randn(8, 2), ["real", "real"]),
    per="sample",
)
sum(output.sum() for output in block(y, mask=torch.ones(2, dtype=torch.bool)).values()).backward()
seen = block.stats()
assert_type(seen.weights, Tensor)
print(seen, block.names)
heads = mf.LinearHeads(10, [3, 1, 7], mf.IMTLG, bias=False, local=[1.0, 2.0, 3.0])
assert_type(heads.joint(y), Tensor)
a, b, c = heads(y)
heads.resolver.reset()
print(mf.DimRatio([3, 4]), mf.LipschitzScale(torch.randn(8, 1), ["real"], lr=1e-3), mf.stats.norms(G), mf.__version__)
print(mf.Krum(1, n_selected=2), mf.TrimmedMean(1), mf.GradDrop(leak=0.1), mf.Constant([1.0, 2.0]), mf.Random(), mf.Sum(), mf.Mean())
print(mf.GradNorm(alpha=0.5, lr=1e-2, update_at=3), mf.NSGD(update_at=2), mf.PCD(tau=0.1, beta=0.9), mf.DualProj(), mf.FairGrad(alpha=2.0))
print(
    mf.Unit(),
    mf.DBMTL(),
    mf.MMPareto(gamma=2.0, every=3),
    mf.NashMTL(every=10),
    mf.ConFIG(length=1),
    mf.GradDrop([0.1, 0.2]),
    mf.SDMGrad(pref=[1.0, 2.0]),
)
print(mf.EMA("dbmtl", beta=0.5), mf.ExcessMTL(n_warmup_steps=2), mf.MConFIG(length="min"), mf.MoDo(), mf.MoCo(rho=0.1))
assert_type(mf.gram(grads, others=rows), Tensor)
print(mf.GradVac(beta=0.1), mf.AlignedMTL(scale="median"), mf.ConFIG(length="projection"), mf.PCGrad(reduction="mean", order="fixed"))

assert_type(mf.collapse.collision_bound([3, 4]), float)
assert_type(mf.collapse.participation(rows[0], [6, 4]), Tensor)
print(mf.collapse.numerical_rank(rows[0], tol=1e-2), mf.collapse.similarity({"a": grads[0], "b": grads[1]}, measure="cosine"))
fusion = nn.Linear(10, 2)
with mf.collapse.Agop(fusion, probes=1) as agop, mf.collapse.watch(fusion, {"a": 6, "b": 4}, every=1) as watch:
    outputs = fusion(rows[0])
    agop.add(outputs)
    outputs.sum().backward()
assert_type(agop.distance(), Tensor)
print(watch, watch.records[0].effective_rank["a"], watch.shares())
