"""Many VAEs of one shape in one process: every layer is one batched product, every block one call of the solver for the problems of all of them."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast.backends.reference import product
from mmfast.blocks.linear_heads import LinearHeads
from mmfast.models.likelihoods import Exponential, Gamma, Joint, LogNormal, Normal
from mmfast.models.vae import VAE
from mmfast.ops.weights import solve_checked
from mmfast.resolvers.base import Resolver
from mmfast.resolvers.solve import precision_of

_ALL = "but Together trains all parameters; train such a model by itself"


class _Block:
    """The rule of some of the models, which are neighbours: one instance that keeps the state of each; of a rule that draws, each model's own."""

    def __init__(self, heads: Sequence[LinearHeads], first: int) -> None:
        self.models = slice(first, first + len(heads))
        self.rule: Resolver = copy.deepcopy(heads[0].resolver)
        self.preserve_norm = heads[0].preserve_norm
        self.draws = any(rule.random for rule in self.rule.chain() or ())
        self.heads = heads
        self.gather()

    def gather(self) -> None:
        """Takes up what the models' rules keep; they see their own parts of it from now on."""
        if self.draws:
            return
        for i, rule in enumerate(self.rule.chain() or ()):
            own = [(of.resolver.chain() or ())[i] for of in self.heads]
            states = [r.state for r in own if r.state is not None]
            if states:
                rule.state = torch.stack(states)
                for e, r in enumerate(own):
                    r.state = rule.state[e]

    def resolved(self, delta: Tensor, weight: Tensor, of_heads: Tensor, head_of: Tensor) -> Tensor:
        """The gradients [E, N, H] of the heads' inputs from those of their outputs [E, N, O] and their weights [E, O, H]."""
        products = product(delta.mT) * product(weight)
        G = (of_heads.mT @ products @ of_heads).contiguous()
        precision = precision_of(delta.dtype)
        if self.draws:  # from streams of their own, as each would by itself: one call each
            own = [solve_checked(g, of.resolver, None, self.preserve_norm, precision) for g, of in zip(G, self.heads, strict=True)]
            w = torch.stack(own)
        else:
            w = solve_checked(G, self.rule, None, self.preserve_norm, precision)
        return (delta * w.to(delta.dtype).index_select(-1, head_of).unsqueeze(1)) @ weight


class _Layer(torch.autograd.Function):
    """relu(x W' + b) of each model. What comes back to it belongs to nobody else, so it is masked in place: many samples of many models fill no cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        h = torch.baddbmm(bias.unsqueeze(1), x, weight.mT).relu_()
        ctx.save_for_backward(x, weight, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, weight, h = ctx.saved_tensors
        torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
        return grad @ weight, grad.mT @ x, grad.sum(1)


class _Heads(torch.autograd.Function):
    """K linear heads of each model; their inputs get the gradient that the model's block resolves."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor, together: "Together") -> Tensor:  # type: ignore[override]
        ctx.together = together
        ctx.save_for_backward(y, weight)
        return torch.baddbmm(bias.unsqueeze(1), y, weight.mT)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        y, weight = ctx.saved_tensors
        t: Together = ctx.together
        parts = []
        for models, block in t.blocks:
            d, w = delta[models], weight[models]
            parts.append(d @ w if block is None else block.resolved(d, w, t.of_heads, t.head_of))
        back = parts[0] if len(parts) == 1 else torch.cat(parts)
        return back, delta.mT @ y, delta.sum(1), None


class Together:
    """E VAEs of one shape that train in one process, each as it would by itself; their rules, seeds, data and learning rates may differ.

    The models stay what they are: their parameters, running means and rules' states become views of what is trained here, so that one may be evaluated
    or saved at any time. The numbers are those of single runs with `torch.optim.Adam` up to the rounding of other matrix products.
    Only the ELBO and IWAE; always as in training mode; all parameters are trained.

    Args:
        models: `VAE`s with equal features, sizes, dropout, objective and samples, in float32 or float64 on the CPU; neighbours with equal rules share one call of the
            solver.
        seeds: one for each; with `torch.manual_seed(seed)` before it, a single run has the same batches and noise.
        lr: Adam's learning rate, one for all or one for each.

    Raises:
        TypeError, ValueError: there is no model, another than a `VAE`, one twice, or models that differ in what must be equal or have frozen parameters; not as many
            seeds or rates as models.

    Example:
        >>> from mmfast.models.likelihoods import Joint, Normal
        >>> models = [VAE(Joint([Normal(), Normal()]), 8, 1, [mf.MGDA()]) for _ in range(3)]
        >>> together = Together(models, seeds=[0, 1, 2])
        >>> losses = together.step(torch.randn(3, 16, 2), torch.ones(3, 16, 2))
        >>> losses.shape
        torch.Size([3])
    """

    def __init__(self, models: Sequence[VAE], seeds: Sequence[int], lr: float | Sequence[float] = 1e-3) -> None:
        if not models:
            raise ValueError("models is empty, expected one at least")
        if len({id(model) for model in models}) < len(models):
            raise ValueError("models holds a model twice, expected each once")
        first = models[0]
        for e, model in enumerate(models):
            if not isinstance(model, VAE):
                raise TypeError(f"models[{e}] is a {type(model).__name__}, expected a VAE of mmfast.models.vae")
        if len(seeds) != len(models):
            raise ValueError(f"seeds has {len(seeds)} numbers, expected one for each of {len(models)} models")
        if first.objective == "dreg":
            raise ValueError("models are of objective 'dreg', which goes back twice; expected 'elbo' or 'iwae'")
        for e, model in enumerate(models):
            shapes = {name: p.shape for name, p in model.named_parameters()}
            same = model.joint.likelihoods == first.joint.likelihoods and shapes == {name: p.shape for name, p in first.named_parameters()}
            if not same or (model.objective, model.samples) != (first.objective, first.samples):
                raise ValueError(f"models[{e}] is of another shape, objective or number of samples than models[0]")
            if _input_layers(model) != _input_layers(first):
                raise ValueError(f"models[{e}] begins with {_input_layers(model)}, expected {_input_layers(first)} as models[0] does")
            kinds = {(p.dtype, p.device.type) for p in model.parameters()}
            dtype = first.mean.weight.dtype
            if kinds != {(dtype, "cpu")} or dtype not in (torch.float32, torch.float64):
                found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
                raise ValueError(f"models[{e}] is of {found}, expected float32 or float64 on the CPU, all models alike")
            if frozen := next((name for name, p in model.named_parameters() if not p.requires_grad), None):
                raise ValueError(f"models[{e}].{frozen} has requires_grad=False, {_ALL}")
        self.models, self.samples = list(models), first.samples
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rates = [lr] * len(models) if isinstance(lr, (int, float)) else list(lr)
        if len(rates) != len(models):
            raise ValueError(f"lr has {len(rates)} numbers, expected one or one for each of {len(models)} models")
        self._share()
        self._own = [
            (e, f"{path}.{own}", p, p.data_ptr(), module._parameters, own)
            for e, model in enumerate(models)
            for path, module in model.named_modules()
            for own, p in module._parameters.items()
            if p is not None
        ]
        # a tensor for each model: where its numbers lie in the processor's vectors, and so their rounding, is the same in every group
        self.rows = list(self.flat)
        of_rate = {rate: [row for row, own in zip(self.rows, rates, strict=True) if own == rate] for rate in dict.fromkeys(rates)}
        self.optimizer = torch.optim.Adam([{"params": rows, "lr": rate} for rate, rows in of_rate.items()], fused=True)
        k = len(first.joint.sizes)
        self.head_of = torch.arange(k).repeat_interleave(torch.tensor(first.joint.sizes))
        self.of_heads = F.one_hot(self.head_of, k).double()
        self.blocks = list(self._blocks())
        self.joint = Joint(first.joint.likelihoods)  # of features that are scaled beforehand
        self.joint_of_logs = Joint([Normal() if isinstance(part, LogNormal) else part for part in first.joint.likelihoods])
        self._scale = torch.stack([model.joint.w for model in models]).unsqueeze(1)
        for model, w in zip(models, self._scale, strict=True):
            model.joint.w = w[0]  # so that one that is loaded later is seen
        self._times = torch.tensor([isinstance(part, (Normal, Gamma, Exponential)) for part in first.joint.likelihoods])
        self._positive = torch.tensor([isinstance(part, LogNormal) for part in first.joint.likelihoods])

    def _share(self) -> None:
        """One tensor [E, all numbers of a model] for the parameters, of which those of the models are views."""
        rows = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in self.models]
        self.flat = torch.stack(rows)
        self.parameters: dict[str, Tensor] = {}
        begin = 0
        for name, p in self.models[0].named_parameters():
            part = self.flat[:, begin : begin + p.numel()].unflatten(1, p.shape)
            self.parameters[name] = part.detach().requires_grad_()
            for e, model in enumerate(self.models):
                model.get_parameter(name).data = part[e]
            begin += p.numel()
        norms = [model.encoder[1] for model in self.models]
        self.batches_tracked = torch.tensor([int(norm.num_batches_tracked) for norm in norms])  # type: ignore[arg-type]
        for norm, count in zip(norms, self.batches_tracked, strict=True):
            norm.num_batches_tracked = count
        self.running = [torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")]
        for name, running in zip(("running_mean", "running_var"), self.running, strict=True):
            for norm, part in zip(norms, running.chunk(len(norms)), strict=True):
                setattr(norm, name, part)

    def _check_models(self) -> None:
        """Raises where a model has other parameters by now (`load_state_dict(assign=True)`, `double()`), or one that is not to be trained."""
        for e, name, p, place, of_module, own in self._own:
            if of_module[own] is not p or p.data_ptr() != place:
                raise ValueError(
                    f"models[{e}] got another tensor for {name}, which is not trained here; load with assign=False, change its dtype before, or make a new Together"
                )
            if not p.requires_grad:
                raise ValueError(f"models[{e}].{name} has requires_grad=False, {_ALL}")

    def _blocks(self) -> Any:
        """(which models, their block or None)"""
        heads = [model.decoder.heads for model in self.models]
        begin = 0
        for end in range(1, len(heads) + 1):
            if end < len(heads) and _rule(heads[end]) == _rule(heads[begin]):
                continue
            members = heads[begin:end]
            yield slice(begin, end), _Block(members, begin) if isinstance(heads[begin], LinearHeads) else None  # type: ignore[arg-type]
            begin = end

    def batches(self, rows: int, batch: int) -> Tensor:
        """Places of rows [batches, E, batch] of one epoch, drawn as `torch.randperm` draws them for each model; rows that are left over are left out.

        Raises:
            ValueError: a batch is not from 1 to as many as there are rows.
        """
        if not 1 <= batch <= rows:
            raise ValueError(f"batch is {batch!r}, expected a whole number from 1 to {rows}, the number of rows")
        orders = torch.stack([torch.randperm(rows, generator=g) for g in self.generators])
        return orders[:, : rows // batch * batch].view(len(self.models), -1, batch).movedim(1, 0)

    def state_dict(self) -> dict[str, Any]:
        """What the models' own `state_dict` do not have: Adam's state and the random streams."""
        return {"optimizer": self.optimizer.state_dict(), "random": [g.get_state() for g in self.generators]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, and what the models' rules have loaded."""
        for _, block in self.blocks:
            if block is not None:
                block.gather()
        self.optimizer.load_state_dict(state["optimizer"])
        for g, random in zip(self.generators, state["random"], strict=True):
            g.set_state(random)

    def step(self, x: Tensor, seen: Tensor) -> Tensor:
        """One step of training on x and seen [E, rows, K]; returns the losses [E] from before it. `stats()` of the models' blocks does not see it, nor does autocast.

        Raises:
            ValueError: x or seen is of another shape, or a model's parameters were frozen or replaced.
            RuntimeError: x has a value that its likelihood does not take.
        """
        n, k = len(self.models), len(self.joint.sizes)
        for name, given in (("x", x), ("seen", seen)):
            if given.dim() != 3 or (given.shape[0], given.shape[2]) != (n, k):
                raise ValueError(f"{name} has shape {tuple(given.shape)}, expected ({n}, rows, {k}): a batch for each model")
        self._check_models()
        with torch.autocast("cpu", enabled=False):  # the products are in float32
            losses = self._losses(x, seen)
            grads = torch.autograd.grad(losses.sum(), list(self.parameters.values()))
        flat = torch.cat([g.flatten(1) for g in grads], 1)
        self.batches_tracked += 1
        for row, grad in zip(self.rows, flat, strict=True):
            row.grad = grad
        self.optimizer.step()
        return losses.detach()

    def _losses(self, x: Tensor, seen: Tensor) -> Tensor:
        mean, std = self._posterior(x, seen)
        n, rows, latent = mean.shape
        noise = torch.stack([torch.randn(self.samples, rows, latent, generator=g, dtype=mean.dtype) for g in self.generators])
        mean, std = mean.unsqueeze(1), std.unsqueeze(1)
        z = mean + std * noise
        h = z.view(n, -1, latent)
        for layer in (0, 2, 4):
            h = _Layer.apply(h, self.parameters[f"decoder.body.{layer}.weight"], self.parameters[f"decoder.body.{layer}.bias"])
        raw = _Heads.apply(h, self.parameters["decoder.heads.weight"], self.parameters["decoder.heads.bias"], self)
        raw = raw.view(n, self.samples, rows, -1)
        log_x = self._log_likelihood(raw, x, seen)
        # log N(z; 0, I) - log N(z; mean, std), where (z - mean) / std is the noise
        log_w = log_x + 0.5 * (noise.square().sum(-1) - z.square().sum(-1)) + std.log().sum(-1)
        return -(log_w.logsumexp(1) - math.log(self.samples)).sum(-1)

    def _log_likelihood(self, raw: Tensor, x: Tensor, seen: Tensor) -> Tensor:
        """Of the observed cells of each row, [E, samples, rows]."""
        x = torch.where(seen != 0, x, 1)  # which has every power and logarithm
        scaled = torch.where(self._times, self._scale * x, torch.where(self._positive, x**self._scale, x))
        powers, joint, volume = scaled[..., self._positive], self.joint, torch.zeros(())
        held = (powers > 1e-20) & (powers < torch.inf) & (x[..., self._positive] > 0)  # that of a negative number may be positive
        if not bool(held.all()):  # float32 does not hold those of a narrow column
            wrong = (~(x >= 0) & self._positive).nonzero()
            if len(wrong):
                raise RuntimeError(
                    f"x of models[{wrong[0, 0]}] has a value in feature {wrong[0, 2]} that its likelihood, LogNormal, does not take, expected a number from 0 on"
                )
            logs = self._scale * x.clamp_min(1e-20).log()
            scaled, joint = torch.where(self._positive, logs, scaled), self.joint_of_logs
            volume = (
                torch.where(self._positive & (seen != 0), logs, 0).sum(-1).unsqueeze(1)
            )  # between the densities of a number and of its logarithm
        shape = (*raw.shape[:-1], -1)
        return joint.log_prob(raw, scaled.unsqueeze(1).expand(shape), seen.unsqueeze(1).expand(shape)).sum(-1) - volume

    def _posterior(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        n, rows, k = x.shape
        dropout, norm = self.models[0].encoder[0], self.models[0].encoder[1]
        assert isinstance(dropout, nn.Dropout) and isinstance(norm, nn.BatchNorm1d) and norm.momentum is not None
        h = torch.where(seen != 0, x, 0)
        if dropout.p > 0:
            kept = [torch.empty(rows, k, dtype=h.dtype).bernoulli_(1 - dropout.p, generator=g) for g in self.generators]
            h = h * torch.stack(kept).div_(1 - dropout.p)
        side_by_side = h.movedim(0, 1).reshape(rows, n * k)  # a batch norm of each model's features is one of all
        weight, bias = (self.parameters[f"encoder.1.{name}"].flatten() for name in ("weight", "bias"))
        mean, variance = self.running
        h = F.batch_norm(side_by_side, mean, variance, weight, bias, True, norm.momentum, norm.eps).view(rows, n, k).movedim(1, 0)
        for layer in (2, 4, 6):
            h = self._linear(f"encoder.{layer}", h).tanh()
        return self._linear("mean", h), F.softplus(self._linear("std", h)) + 1e-6

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return torch.baddbmm(self.parameters[f"{name}.bias"].unsqueeze(1), x, self.parameters[f"{name}.weight"].mT)


def _input_layers(model: VAE) -> str:
    """What is done to the inputs, in words: a dropout and a batch norm, which have no shape that would tell."""
    dropout, norm = model.encoder[0], model.encoder[1]
    assert isinstance(dropout, nn.Dropout) and isinstance(norm, nn.BatchNorm1d)
    if norm.momentum is None:
        raise ValueError("models have a batch norm of momentum None, a mean over all batches; expected a number")
    return f"dropout of {dropout.p} and a batch norm of momentum {norm.momentum} and eps {norm.eps}"


def _rule(heads: nn.Module) -> str | None:
    """What must be equal for heads of several models to be one batch of problems."""
    return f"{heads.resolver!r} {heads.preserve_norm} {heads.per}" if isinstance(heads, LinearHeads) else None
