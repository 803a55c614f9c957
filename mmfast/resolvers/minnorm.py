"""Rules that look for the shortest vector of the gradients' hull: MGDA, MMPareto, CAGrad.

csrc/solvers/minnorm.h solves them by an active set; the plain-torch forms here are interior-point methods, so each checks the other.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.resolvers.base import Problem, Rule
from mmfast.resolvers.linalg import cosines, times

# a squared length below this part of its summands' is what rounding left over: its direction means nothing
CANCELLED = 1e-14
HULL = 1e-12  # square of the shortest vector of the hull of unit rows: below it, zero counts as inside
ITERATIONS = 40
NOTHING = 1e-9  # a share of the largest below which a weight that has a slack is zero


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _longest_step(*moves: tuple[Tensor, Tensor]) -> Tensor:
    """The largest step up to 1 that keeps every (value, change) positive, less a little."""
    limits = torch.cat([torch.where(change < 0, -value / change, torch.inf) for value, change in moves], -1)
    return (0.995 * limits.amin(-1, keepdim=True)).clamp(max=1)


def _solver(C: Tensor, diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """r -> (C + diag(diagonal))^-1 r for r [B, K]; a small ridge keeps the factor of a singular C finite."""
    ridge = (C.shape[-1] + 8) * 1e-15
    L, info = torch.linalg.cholesky_ex(C + torch.diag_embed(diagonal + ridge), check_errors=False)
    L = torch.where(info.view(-1, 1, 1) == 0, L, torch.nan)
    return lambda r: torch.cholesky_solve(r.unsqueeze(-1), L).squeeze(-1)


def _advance(step: Tensor, *moves: tuple[Tensor, Tensor]) -> list[Tensor]:
    """value + step * change, or value where the change is not finite (the problem is solved as far as the digits go)."""
    sound = torch.cat([change for _, change in moves], -1).isfinite().all(-1, keepdim=True)
    return [torch.where(sound, value + step * change, value) for value, change in moves]


def _quadratic(C: Tensor, q: Tensor, a: Tensor, active: Tensor, simplex: bool) -> Tensor:
    """argmin over x >= 0 (and a'x = 1 if simplex) of x'Cx / 2 + q'x, by Mehrotra's predictor and corrector."""
    count = active.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(active, 1 / a.sum(-1, keepdim=True), 1)
    s, y = x.clone(), torch.zeros_like(x[..., :1])
    for _ in range(ITERATIONS):
        dual = torch.where(active, s + a * y - q - times(C, x), 0)
        primal = 1 - _dot(a, x)
        mu = _dot(x, s * active) / count
        solve = _solver(C, s / x)
        along = solve(a)
        dx = ds = torch.zeros_like(x)
        for centring in (False, True):
            target = -x * s
            if centring:
                step = _longest_step((x, dx), (s, ds))
                ahead = _dot(x + step * dx, (s + step * ds) * active) / count
                target = target + mu * (ahead / mu) ** 3 - dx * ds
            target = torch.where(active, target, 0)
            dx = solve(dual + target / x)
            dy = (primal - _dot(a, dx)) / _dot(a, along) if simplex else torch.zeros_like(y)
            dx = torch.where(active, dx + along * dy, 0)
            ds = (target - s * dx) / x
        x, s, y = _advance(_longest_step((x, dx), (s, ds)), (x, dx), (s, ds), (y, dy))
    if simplex:  # what only its barrier keeps above zero is none: a step after this one would take the row for a gradient
        x = torch.where((x < s) & (x < NOTHING * torch.where(active, x, 0).amax(-1, keepdim=True)), 0, x)
    return torch.where(active, x, 0)


def _ball(C: Tensor, b: Tensor, a: Tensor, active: Tensor, c: float) -> Tensor:
    """argmin over x >= 0 with a'x = 1 of b'x + c |U'x|, where C = U U'.

    The norm is smoothed along with the barrier, and c U'x / |U'x| = U'z is a variable of its own, of length at most c
    (Chan, Golub & Mulet, "A nonlinear primal-dual method for total variation-based image restoration", 1999): that keeps
    Newton's method on its way where the norm bends.
    """
    count = active.sum(-1, keepdim=True).clamp(min=1)
    x = torch.where(active, 1 / a.sum(-1, keepdim=True), 1)
    z, nu = torch.zeros_like(x), torch.zeros_like(x[..., :1])
    s = torch.full_like(x, 10 * (1 + c))
    sigma = torch.ones_like(nu)
    for _ in range(ITERATIONS):
        xa = torch.where(active, x, 0)
        Cx, Cz = times(C, xa), times(C, z)
        dual = torch.where(active, s + nu * a - b - Cz, 0)
        primal = 1 - _dot(a, xa)
        yy = _dot(xa, Cx).clamp(min=0)
        mu = _dot(xa, s) / count
        goal = sigma * mu
        bend = goal / (2 * c)
        root = (yy + bend.square()).sqrt()
        tau = bend + root
        solve = _solver(C, tau / c * s / x)  # times tau / c
        E, N, g = solve(Cz / c), solve(a * tau / c), Cx / root
        det = 1 - _dot(g, E)
        N = N + E * _dot(g, N) / det
        target = torch.where(active, goal - x * s, 0)
        F = solve((dual + target / x + Cz) * tau / c - Cx)
        F = F + E * _dot(g, F) / det
        dnu = (primal - _dot(a, F)) / _dot(a, N)
        dx = torch.where(active, F + N * dnu, 0)
        ds = torch.where(active, (target - s * dx) / x, 0)
        dz = (c * (xa + dx) - z * _dot(g, dx)) / tau - z
        step = _longest_step((x, dx), (s, ds))
        sigma = torch.where(step > 0.9, 0.03, 1.0)  # without progress, back to the middle first
        x, s, z, nu = _advance(step, (x, dx), (s, ds), (z, dz), (nu, dnu))
        z = z * (c / _dot(z, times(C, z)).clamp(min=0).sqrt()).clamp(max=1)
    return torch.where(active, x, 0)


def _share(G: Tensor, w: Tensor) -> Tensor:
    """Rows that no entry of G tells apart share their weight, so that copies are treated alike."""
    norm = G.diagonal(dim1=-2, dim2=-1).sqrt()
    alike = torch.ones_like(G, dtype=torch.bool)
    rounding = 4 * torch.finfo(G.dtype).eps * norm
    for l in range(G.shape[-1]):
        column = G[..., l]
        alike &= (column.unsqueeze(-1) - column.unsqueeze(-2)).abs() <= rounding.unsqueeze(-1) * norm[..., l].view(-1, 1, 1)
    places = torch.arange(G.shape[-1], device=G.device)
    first = (alike.int().argmax(-1, keepdim=True) == places).to(G.dtype)  # [B, K, K]: row i belongs to group j
    return times(first, times(first.mT, w) / first.sum(-2).clamp(min=1))


def _cosines(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(cosines, norms of the rows, their inverses relative to the largest; 0 where a row does not take part)."""
    norm, C = cosines(p.G)
    shortest = torch.where(p.active, norm, torch.inf).amin(-1, keepdim=True)
    return C, norm, torch.where(p.active, shortest / norm, 0)


def _shortest(p: Problem, C: Tensor, a: Tensor) -> Tensor:
    """Weights [B, K] on the simplex of the shortest vector of the hull of gradients of lengths 1 / a, whose cosines are C."""
    x = a * _quadratic(C, torch.zeros_like(a), a, p.active, simplex=True)
    return _share(p.G, x / x.sum(-1, keepdim=True))


class MGDA(Rule):
    """Multiple-gradient descent (Sener & Koltun, "Multi-task learning as multi-objective optimization", 2018): the shortest vector of the hull.

    Where several weights give it, copies of a row share alike.

    The shortest vector leans on the shortest gradient, and may be nearly orthogonal to the sum of all. Where gradients differ much in length, don't give it
    the length of the plain sum (`preserve_norm=True`, the default of blocks): that blows the one gradient up. A VAE on Wine (13 features) was ruined so: 96 to
    100 % of the weight on one binary feature, cosine with the sum 0.00 to 0.03, factors of 500 to 1e5. Take `preserve_norm=False` there.

    Args:
        normalize: "none", or "l2" to find the weights a_i on gradients of length 1; the weights are then a_i / |g_i|.
        cap: None, or the most that an a_i may be, in (0, 1]; the result is then no shortest vector any more. For comparison with the code that
            Javaloy et al. (ICML 2022) published, which has 1e-3 with preserved norm: there all weights that are not zero come out nearly alike.

    Raises:
        ValueError: another `normalize`, or a `cap` out of range.

    Example:
        >>> mf.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), mf.MGDA(cap=0.5))
        tensor([0.5000, 0.4000], dtype=torch.float64)
    """

    method = 6
    lifts = True
    cap: float | None = None

    def __init__(self, normalize: str = "none", cap: float | None = None, *, every: int = 1) -> None:
        super().__init__(every=every)
        if normalize in ("loss", "loss+"):
            raise ValueError(f'normalize is "{normalize}", but a resolver sees gradients, not losses; expected "none" or "l2"')
        if normalize not in ("none", "l2"):
            raise ValueError(f'normalize is {normalize!r}, expected "none" or "l2"')
        if cap is not None and not 0 < cap <= 1:
            raise ValueError(f"cap is {cap!r}, expected None or a number above 0 and at most 1")
        self.normalize, self.cap = normalize, cap

    def params(self) -> list[float]:
        return [float(self.normalize == "l2")] + ([] if self.cap is None else [float(self.cap)])

    @property
    def degree(self) -> float:  # type: ignore[override]
        return -1.0 if self.normalize == "l2" else 0.0

    def rule(self, p: Problem) -> Tensor:
        C, norm, a = _cosines(p)
        w = _shortest(p, C, p.active.double() if self.normalize == "l2" else a)
        w = w if self.cap is None else w.clamp(max=self.cap)
        return w / norm / p.scale.sqrt().unsqueeze(-1) if self.normalize == "l2" else w

    def extra_repr(self) -> str:
        return f"normalize={self.normalize!r}" + ("" if self.cap is None else f", cap={self.cap}")


class MMPareto(Rule):
    """The plain sum where no two gradients conflict, else K times the shortest vector of their hull, made at least as long as the sum; all of it times
    gamma (Wei & Hu, "MMPareto: boosting multimodal learning with innocent unimodal assistance", ICML 2024).

    The paper has two rows, for each encoder the gradients of the multimodal and of its unimodal loss; more are taken alike. Its code compares the lengths
    one parameter at a time: call it for each, or take the gradients of all as one problem, as here. A direction that is rounding, where rows
    are opposite, is not made longer. `preserve_norm=True`, the default of blocks, gives the length of the sum whatever gamma is.

    Args:
        gamma: a positive number.

    Example:
        >>> mf.weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), mf.MMPareto())
        tensor([2.2045, 1.4697], dtype=torch.float64)
    """

    method = 22
    lifts = True

    def __init__(self, gamma: float = 1.5, *, every: int = 1) -> None:
        super().__init__(every=every)
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma is {gamma!r}, expected a positive number")
        self.gamma = float(gamma)

    def params(self) -> list[float]:
        return [self.gamma]

    def rule(self, p: Problem) -> Tensor:
        C, norm, a = _cosines(p)
        pair = p.active.unsqueeze(-1) & p.active.unsqueeze(-2)
        conflict = (pair & (p.G <= 0)).any(-1).any(-1).unsqueeze(-1)
        one, w = p.active.double(), p.count.unsqueeze(-1) * _shortest(p, C, a)
        lift = p.lift / (1 + p.lift)  # part of the diagonal of G that no gradient has
        sum2, ours2 = (_dot(x, times(p.G, x)) - lift * _dot(x * norm, x * norm) for x in (one, w))
        shorter = (ours2 > p.cancelled * _dot(w, norm).square()) & (ours2 < sum2)
        factor = torch.where(shorter, (sum2 / torch.where(shorter, ours2, 1)).sqrt(), 1)
        return self.gamma * torch.where(conflict, factor * w, one)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


class CAGrad(Rule):
    """Conflict-averse gradient descent (Liu et al., 2021): within c |g0| of the mean gradient g0, the vector whose worst inner product is best.

    The weights are 1/K + c |g0| / |g_w| w. Two limits: where the mean gradient is zero it is returned as it is; where zero lies in the
    hull (no direction helps all) and the ball holds directions that harm none, the one nearest to the mean gradient is returned.

    Args:
        c: radius of the ball, relative to |g0|; finite and not negative. 0 gives the mean.
        rescale: 0 as in the paper's formula, 1 to divide by 1 + c^2, 2 to divide by 1 + c.
    """

    method = 7
    lifts = True

    def __init__(self, c: float = 0.5, rescale: int = 0, *, every: int = 1) -> None:
        super().__init__(every=every)
        if not (math.isfinite(c) and c >= 0):
            raise ValueError(f"c is {c}, expected a finite number that is not negative")
        if rescale not in (0, 1, 2):
            raise ValueError(f"rescale is {rescale}, expected 0, 1 or 2")
        self.c = float(c)
        self.rescale = int(rescale)

    def params(self) -> list[float]:
        return [self.c, float(self.rescale)]

    def rule(self, p: Problem) -> Tensor:
        C, norm, a = _cosines(p)
        share = p.active / p.count.clamp(min=1).unsqueeze(-1)
        lift = p.lift / (1 + p.lift)  # part of the diagonal of G that no gradient has
        mean2 = (_dot(share, times(p.G, share)) - lift * _dot(share.square(), norm.square())).clamp(min=0)
        shrink = (1.0, 1 / (1 + self.c**2), 1 / (1 + self.c))[self.rescale]
        known = mean2 > p.cancelled * _dot(share, norm).square()
        if self.c == 0:
            return shrink * share
        length = torch.where(known, mean2, 1).sqrt()
        b = torch.where(p.active, times(p.G, share) / norm / length, 0)  # cosines with the mean gradient
        x = _ball(C, b, a, p.active, self.c)
        length2 = _dot(x, times(C, x))
        inside = _quadratic(C, b, a, p.active, simplex=False)
        inside2 = _dot(inside, times(C, inside))
        # where zero lies in the hull and nothing helps every row, x is nothing but rounding: that is told by the shortest vector of the hull
        hull = _quadratic(C, torch.zeros_like(b), p.active.double(), p.active, simplex=True)
        zero = _dot(hull, times(C, hull)) <= torch.clamp(4 * lift * _dot(hull, hull), min=HULL)  # little more than the lift is left
        stuck = zero & (inside2 <= self.c**2 * (1 + 1e-9))
        away = (length2 > CANCELLED * x.sum(-1, keepdim=True).square()) & ~stuck
        inside = inside * (self.c / inside2.sqrt()).clamp(max=1)
        z = torch.where(away, self.c * x / length2.sqrt(), inside)
        return shrink * (share + _share(p.G, torch.where(known & p.active, z * length / norm, 0)))

    def extra_repr(self) -> str:
        return f"c={self.c}, rescale={self.rescale}"
