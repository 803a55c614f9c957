"""The impartiality block as it is usually written: K x N gradients materialised, Python loops over rows and pairs, copies to NumPy for solvers.

The baseline that a user has today, and an oracle that shares no code with mmfast. Each rule maps the rows g [K, N] to resolved
rows [K, N]; `resolve` rescales their sum to the length of the plain sum.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def identity(g: Tensor) -> Tensor:
    return g


def pcgrad(g: Tensor) -> Tensor:
    """PCGrad (Yu et al., 2020): each row loses its part along every row it conflicts with, in random order."""
    rows = []
    for i in range(len(g)):
        row = g[i].clone()
        for j in torch.randperm(len(g)).tolist():
            if j != i and torch.cosine_similarity(row, g[j], dim=0) < 0:
                row -= torch.dot(row, g[j]) / torch.dot(g[j], g[j]).clamp(min=1e-15) * g[j]
        rows.append(row)
    return torch.stack(rows)


def gradvac(g: Tensor, beta: float = 0.5) -> Tensor:
    """GradVac (Wang et al., 2021) from a target of zero: pulls each pair's cosine up to its moving average."""
    target = torch.zeros(len(g), len(g))
    rows = []
    for i in range(len(g)):
        row = g[i].clone()
        for j in torch.randperm(len(g)).tolist():
            if j == i:
                continue
            cosine, aim = torch.cosine_similarity(row, g[j], dim=0), target[i, j].clone()
            if cosine < aim:
                lift = row.norm() * (aim * (1 - cosine**2).sqrt() - cosine * (1 - aim**2).sqrt())
                row = row + lift / (g[j].norm() * (1 - aim**2).sqrt()) * g[j]
            target[i, j] = (1 - beta) * aim + beta * cosine
        rows.append(row)
    return torch.stack(rows)


def mgda(g: Tensor, steps: int = 250) -> Tensor:
    """MGDA (Sener and Koltun, 2018): the shortest vector of the convex hull, by moving weight between two rows at a time."""
    G = torch.stack([torch.stack([torch.dot(a, b) for b in g]) for a in g])
    w = torch.full((len(g),), 1 / len(g), dtype=g.dtype)
    for _ in range(steps):
        slope = G @ w
        best, worst = int(slope.argmin()), int(torch.where(w > 0, slope, -torch.inf).argmax())
        gap = slope[worst] - slope[best]
        if gap <= 1e-6 * G.diagonal().max():
            break
        move = torch.minimum(gap / (G[best, best] + G[worst, worst] - 2 * G[best, worst]), w[worst])
        w[best] += move
        w[worst] -= move
    return w.unsqueeze(1) * g


def imtlg(g: Tensor) -> Tensor:
    """IMTL-G (Liu et al., 2021): equal projections of the sum on every unit gradient."""
    if len(g) == 1:
        return g
    unit = g / g.norm(dim=1, keepdim=True)
    D, U = g[:1] - g[1:], unit[:1] - unit[1:]
    rest = g[0] @ U.T @ torch.linalg.pinv(D @ U.T)
    return torch.cat([1 - rest.sum().view(1), rest]).unsqueeze(1) * g


def cagrad(g: Tensor, c: float = 0.5) -> Tensor:
    """CAGrad (Liu et al., 2021): the worst-case weights from a general solver in NumPy."""
    import numpy as np
    from scipy.optimize import minimize

    k = len(g)
    A = (g @ g.T).double().numpy()
    radius = c * np.sqrt(A.mean() + 1e-8) + 1e-8

    def objective(x: "np.ndarray") -> float:
        return x @ A.mean(1) + radius * np.sqrt(x @ A @ x + 1e-8)

    found = minimize(objective, np.full(k, 1 / k), bounds=[(0, 1)] * k, constraints={"type": "eq", "fun": lambda x: 1 - x.sum()})
    worst = torch.from_numpy(found.x).to(g) @ g
    return (g + radius / (worst.norm() + 1e-8) * worst) / k


class GradNorm:
    """GradNorm on gradient norms (Chen et al., 2018): learned weights, one optimiser step per call."""

    def __init__(self, k: int, alpha: float = 0.0, lr: float = 1e-3, update_at: int = 20) -> None:
        self.theta = torch.zeros(k, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.theta], lr=lr)
        self.alpha, self.update_at, self.calls, self.first = alpha, update_at, 0, torch.ones(k)

    def __call__(self, g: Tensor) -> Tensor:
        norms = torch.stack([row.norm() for row in g])
        if self.calls == self.update_at:
            self.first = norms
        self.calls += 1
        with torch.enable_grad():  # inside a backward pass gradients are off
            share = self.theta.exp().clamp(min=1e-5)
            a = len(g) * share / share.sum()
            progress = norms / self.first
            goal = (a * norms).mean().detach() * (progress / progress.mean()) ** self.alpha
            self.optimizer.zero_grad()
            (a * norms - goal).abs().sum().backward()
        self.optimizer.step()
        return a.detach().unsqueeze(1) * g


class NSGD:
    """The magnitude step of RotoGrad (Javaloy and Valera, 2022): all rows get one norm, an average weighted by each one's progress."""

    def __init__(self, k: int, update_at: int = 20) -> None:
        self.update_at, self.calls, self.first = update_at, 0, torch.ones(k)

    def __call__(self, g: Tensor) -> Tensor:
        norms = torch.stack([row.norm() for row in g])
        if self.calls == self.update_at:
            self.first = norms
        self.calls += 1
        progress = norms / self.first
        return ((progress / progress.sum()) @ norms / norms).unsqueeze(1) * g


# K -> the rule on rows
RULES: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "Sum": lambda k: identity,
    "PCGrad": lambda k: pcgrad,
    "GradVac": lambda k: gradvac,
    "MGDA": lambda k: mgda,
    "IMTLG": lambda k: imtlg,
    "CAGrad": lambda k: cagrad,
    "GradNorm": GradNorm,
    "NSGD": NSGD,
}


def resolve(grads: Sequence[Tensor], rule: Callable[[Tensor], Tensor]) -> Tensor:
    """The resolved gradient, as long as the plain sum."""
    g = torch.stack([x.flatten() for x in grads])
    d = rule(g).sum(0)
    return (d * (g.sum(0).norm() / d.norm().clamp(min=1e-10))).view_as(grads[0])


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, k: int, rule: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        ctx.rule = rule
        return tuple(y.clone() for _ in range(k))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return resolve(grads, ctx.rule), None, None


def fork(y: Tensor, k: int, rule: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """K copies of y whose gradients are resolved into y's."""
    return _Fork.apply(y, k, rule)
