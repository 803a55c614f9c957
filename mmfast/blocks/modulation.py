"""Gradient modulation against modality imbalance: a beta found anew at every step, from how well each modality does by itself.

The papers scale the gradients of each modality's encoder, in models that fuse the encoders' outputs. `features = scale(features)` is the place for that: behind the
encoders, before the fusion. As `local=` of a block it scales the branches' gradients instead: there the modalities are branches of one tensor.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mmfast import contract
from mmfast.blocks import transforms
from mmfast.blocks.local_step import scale_outputs
from mmfast.blocks.scaling import LocalScale
from mmfast.precision import Keeping

_numbers = itertools.count()
_modulations: "WeakValueDictionary[int, GradientModulation]" = WeakValueDictionary()


# A compiled backward pass gets the tensors it was traced with as they were in the forward pass; beta is found in between. What reads it has to look for itself.
@torch.library.custom_op("mmfast::modulation", mutates_args=())
def _current(grad: Tensor, number: int, k: int) -> Tensor:
    """The beta of a modulation, float64 [k]; the gradient is taken so that this waits for the backward pass."""
    return _modulations[number].beta.to(grad.device, copy=True)


@_current.register_fake
def _(grad: Tensor, number: int, k: int) -> Tensor:
    return torch.empty(k, dtype=torch.float64, device=grad.device)


class GradientModulation(Keeping, LocalScale):
    """What OGM, AGM and CGGM share: `update` finds beta between forward and backward pass, and the backward pass reads it; nothing waits for the device.

    Attributes:
        beta: float64 [K], 1 before the first update. It and what else is kept are buffers, in the state_dict of whatever holds the modulation.
    """

    always = True
    beta: Tensor
    _waits = False  # whether something was scaled since the last update
    _updated = _told = False
    names: tuple[str, ...] | None = None  # of the branches of the block whose local step it is

    def __init__(self, k: int) -> None:
        nn.Module.__init__(self)
        if not isinstance(k, int) or isinstance(k, bool) or not 2 <= k <= contract.MAX_GRADS:
            raise ValueError(f"k is {k!r}, expected the number of modalities, 2 to {contract.MAX_GRADS}")
        self.k = k
        self.register_buffer("beta", torch.ones(k, dtype=torch.float64))
        self._enlist()

    def factors(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The beta of a step, float64 [K], from float64 logits [K, N, C] and labels [N]."""
        raise NotImplementedError

    def forward(self, features: Sequence[Any]) -> tuple[Any, ...]:
        """The features as they are; in the backward pass the gradient of each is multiplied by its modality's beta.

        Args:
            features: K tensors, one from each modality's encoder, or tuples, lists and dicts of tensors.
        """
        if isinstance(features, Tensor) or not isinstance(features, Sequence) or len(features) != self.k:
            what = f"{len(features)} entries" if isinstance(features, (list, tuple)) else f"a {type(features).__name__}"
            raise ValueError(f"features has {what}, expected a list of {self.k}, one per modality")
        if transforms.exporting():
            return tuple(features)
        self.entered()
        return tuple(scale_outputs(feature, self, i, f"encoder {i}") for i, feature in enumerate(features))

    @torch.no_grad()
    def update(self, logits: Sequence[Tensor] | Mapping[str, Tensor] | Tensor, labels: Tensor) -> None:
        """Finds the beta of this step's backward pass; to be called after the forward pass and before `loss.backward()`.

        Args:
            logits: K tensors [..., C], what each modality predicts by itself, in the order of the features or branches, or by the branches' names; no gradient
                flows through them.
            labels: classes, whole numbers [...], on the device of beta, as the logits.

        Raises:
            TypeError, ValueError: an argument is not as described.
            RuntimeError: inside a transformation of torch.func, or in one graph with its backward pass.
        """
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling() and _traces_backward_passes():
            raise RuntimeError(
                f"{type(self).__name__}.update can't be called inside a transformation of torch.func, nor compiled into one graph with its backward pass, which would "
                "read the beta of the step before; call it between the two"
            )
        rows = [x.detach().double().reshape(-1, x.shape[-1]) for x in self._checked(logits, labels)]
        self.beta.copy_(self.factors(torch.stack(rows), labels.long().flatten()))
        if not torch.compiler.is_compiling():
            self._waits, self._updated = False, True

    def current(self, grad: Tensor) -> Tensor:
        """Called in a backward pass: the beta that its step has found."""
        if torch.compiler.is_compiling():
            return torch.ops.mmfast.modulation(grad, self._number, self.k)
        original = _modulations[self._number]  # of which this may be DataParallel's copy
        if original._waits and original._updated and not original._told:
            original._told = True
            contract.tell(
                f"{type(self).__name__}.update was not called between this forward and backward pass, so the gradients are scaled by the beta of an earlier step; "
                "call update(logits, labels) before loss.backward(), or reset() to scale nothing"
            )
        return original.beta.to(grad.device)

    def entered(self) -> None:
        """Called in a forward pass, of which a backward pass may follow."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() == -1:  # not where checkpointing computes something again, in a backward pass
            _modulations[self._number]._waits = True

    def reset(self) -> None:
        """As at first: beta is 1, and nothing is remembered."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            buffer.fill_(float(name == "beta"))
        self._waits = self._updated = False

    reset_parameters = reset

    def _checked(self, logits: Any, labels: Any) -> list[Tensor]:
        if len(logits) != self.k:
            raise ValueError(f"logits has {len(logits)} entries, expected {self.k}, one per modality")
        if isinstance(logits, Mapping) and self.names is not None:
            if set(logits) != set(self.names):
                raise ValueError(
                    f"logits has the names {', '.join(map(str, logits))}, expected those of the branches: {', '.join(self.names)}"
                )
            logits = [logits[name] for name in self.names]
        rows = list(logits.values() if isinstance(logits, Mapping) else logits)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            what = labels.dtype if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
            raise TypeError(f"labels is {what}, expected a tensor of whole numbers, the classes")
        if not labels.numel():
            raise ValueError("labels is empty, expected one class at least")
        for i, row in enumerate(rows):
            if not isinstance(row, Tensor) or not row.is_floating_point():
                raise TypeError(
                    f"logits[{i}] is {row.dtype if isinstance(row, Tensor) else type(row).__name__}, expected a floating-point tensor"
                )
            if row.dim() == 0 or row.shape[:-1] != labels.shape or row.shape != rows[0].shape:
                raise ValueError(
                    f"logits[{i}] has shape {tuple(row.shape)}, expected {(*labels.shape, 'C')}, as labels has, and the same of all modalities"
                )
            if row.device != self.beta.device:
                raise ValueError(f"logits[{i}] is on {row.device}, but {type(self).__name__} on {self.beta.device}; move it there by .to()")
        return rows

    def _enlist(self) -> None:
        self._number = next(_numbers)
        _modulations[self._number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enlist()  # a copy finds its own beta

    def extra_repr(self) -> str:
        return str(self.k)


def _traces_backward_passes() -> bool:
    return bool(getattr(torch._dynamo.config, "trace_autograd_ops", False))


def _log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, [K, N]."""
    at_labels = labels.expand(len(logits), -1).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, at_labels).squeeze(-1)


class OGM(GradientModulation):
    """On-the-fly gradient modulation: modalities ahead of the weakest get smaller gradients (Peng et al., "Balanced multimodal learning via on-the-fly gradient modulation", CVPR 2022).

    beta_i = 1 - tanh(alpha rho_i) where rho_i, the batch's probability mass on the labels by modality i over that of the weakest other modality, is above 1; else 1. As published this is no
    continuous function: ahead by ever so little, beta is 1 - tanh(alpha). The noise GE of the paper is not here: it is added to the gradients of parameters.
    What each modality predicts by itself, where a linear layer fuses concatenated features: `features[i] @ weight_i.T + bias / K`, weight_i its columns of the weight.
    In a process group each rank goes by its own part of the batch.

    Args:
        k: number of modalities.
        alpha: how strongly, above 0; the released code's default is 0.1, it recommends 0.1 for VGGSound and 0.8 for CREMA-D.

    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> encoders = nn.ModuleList([nn.Linear(8, 16), nn.Linear(4, 16)])
        >>> heads = nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 3)])
        >>> inputs, labels = (torch.randn(32, 8), torch.randn(32, 4)), torch.randint(3, (32,))
        >>> ogm = mf.OGM(2, alpha=0.3)
        >>> features = ogm([encoder(x) for encoder, x in zip(encoders, inputs)])
        >>> logits = [head(feature) for head, feature in zip(heads, features)]
        >>> loss = nn.functional.cross_entropy(sum(logits), labels)
        >>> ogm.update(logits, labels)
        >>> loss.backward()  # the encoders' gradients are scaled, the heads' are not
        >>> ogm.beta.max()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, k: int = 2, alpha: float = 0.1) -> None:
        super().__init__(k)
        self.alpha = _positive(alpha, "alpha")

    def factors(self, logits: Tensor, labels: Tensor) -> Tensor:
        mass = _log_likelihoods(logits, labels).logsumexp(1)
        itself = torch.eye(self.k, dtype=torch.bool, device=mass.device)
        rho = (mass - mass.expand(self.k, -1).masked_fill(itself, math.inf).amin(1)).exp()
        # 1 - tanh(x) = 2 / (1 + exp(2 x)), which keeps its digits; what is not a number stays so
        return torch.where(rho <= 1, 1.0, 2 * torch.sigmoid(-2 * self.alpha * rho))

    def extra_repr(self) -> str:
        return f"{self.k}, alpha={self.alpha:g}"


class AGM(GradientModulation):
    """Adaptive gradient modulation: a modality ahead of the others by more than it used to be gets smaller gradients, one behind larger ones (Li et al., "Boosting multi-modal model performance with
    adaptive gradient modulation", ICCV 2023).

    beta_i = exp(alpha min(tau_i - r_i, 7)): r_i is exp of the others' mean loss less the own one, by cross-entropies of the batch (at most -log 1e-8 for a sample), tau_i the same of the means over all
    steps before, 1 at the first. (The released code has 10 in place of 7 for two modalities.) A step with a loss that is not finite is not remembered.
    The logits are to be each modality's part in the model's: where a linear layer fuses, those that `OGM` takes; for any other fusion `AGM.shapley_logits`.
    In a process group each rank goes by its own part of the batch.

    Args:
        k: number of modalities.
        alpha: how strongly, above 0; 1 is the released code's default.

    Attributes:
        mean: the mean losses so far, float64 [K], over `steps` [1].

    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> agm, labels = mf.AGM(2), torch.tensor([0, 1])
        >>> agm.update([torch.eye(2), torch.zeros(2, 2)], labels)  # the first is ahead
        >>> agm.beta
        tensor([0.6299, 1.3717], dtype=torch.float64)
    """

    mean: Tensor
    steps: Tensor

    def __init__(self, k: int = 2, alpha: float = 1.0) -> None:
        super().__init__(k)
        self.alpha = _positive(alpha, "alpha")
        self.register_buffer("mean", torch.zeros(k, dtype=torch.float64))
        # torch.compile (2.13) loses what is written to a [] of float64 on a CPU
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float64))

    def factors(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = -_log_likelihoods(logits, labels).clamp(min=math.log(1e-8)).mean(1)
        beta = (self.alpha * (self._ahead(self.mean) - self._ahead(losses)).clamp(max=7)).exp()
        known = losses.isfinite().all()
        self.steps.add_(known)
        self.mean.copy_(torch.where(known, self.mean + (losses - self.mean) / self.steps, self.mean))
        return beta

    def _ahead(self, losses: Tensor) -> Tensor:
        """exp of the mean of the others' losses less the own one."""
        return (self.k / (self.k - 1) * (losses.mean() - losses)).exp()

    @staticmethod
    def shapley_logits(predict: Callable[[tuple[bool, ...]], Tensor], k: int) -> list[Tensor]:
        """Each modality's part in the logits of a model, whatever its fusion: its Shapley value, where without any modality they are 0. All parts add up to the logits.

        Args:
            predict: takes k bools, the modalities that are there, and returns logits; called 2^k - 1 times (in eval mode and under torch.no_grad, if only `update` needs them).
            k: number of modalities.

        Example:
            >>> features = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
            >>> mf.AGM.shapley_logits(lambda there: (features * torch.tensor(there)[:, None]).sum(0), 2)
            [tensor([1., 0.]), tensor([0., 4.])]
        """
        logits = {there: predict(there) for there in itertools.product((True, False), repeat=k) if any(there)}
        parts = []
        for i in range(k):
            gains = []
            for there, with_it in logits.items():
                if there[i]:
                    others = sum(there) - 1
                    gain = with_it - logits[(*there[:i], False, *there[i + 1 :])] if others else with_it
                    gains.append(gain / (k * math.comb(k - 1, others)))
            parts.append(torch.stack(gains).sum(0))
        return parts

    def extra_repr(self) -> str:
        return f"{self.k}, alpha={self.alpha:g}"


class CGGM(GradientModulation):
    """Classifier-guided gradient modulation: the more of the gain in accuracy is a modality's, the smaller its gradients (Guo et al., "Classifier-guided gradient modulation for enhanced multimodal
    learning", NeurIPS 2024).

    beta_i = rho (1 - gain_i / sum of the gains), the gains those of the accuracies from one step's batch to the next, from 0 at the first. Where the released code divides by a sum of signed
    gains, which may be near 0 or turn a gradient round, a loss of accuracy counts here as no gain, and where nothing is gained all count alike. Gains that are alike give
    rho (K - 1) / K. The paper's second part, a loss that turns gradients towards the classifiers', is not here.
    The logits are those of a classifier on each encoder's features, trained beside the model and without a gradient for the encoders.
    In a process group each rank goes by its own part of the batch.

    Args:
        k: number of modalities.
        rho: the factor, above 0; 1.3 is the released code's, k / (k - 1) leaves modalities alone that gain alike.

    Attributes:
        accuracy: of the last step, float64 [K].

    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> cggm, labels = mf.CGGM(2, rho=2.0), torch.tensor([0, 1])
        >>> cggm.update([torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])], labels)  # all right, one of two
        >>> cggm.beta
        tensor([0.6667, 1.3333], dtype=torch.float64)
    """

    accuracy: Tensor

    def __init__(self, k: int = 2, rho: float = 1.3) -> None:
        super().__init__(k)
        self.rho = _positive(rho, "rho")
        self.register_buffer("accuracy", torch.zeros(k, dtype=torch.float64))

    def factors(self, logits: Tensor, labels: Tensor) -> Tensor:
        accuracy = (logits.argmax(-1) == labels).double().mean(1)
        gains = (accuracy - self.accuracy).clamp(min=0)
        self.accuracy.copy_(accuracy)
        total = gains.sum()
        return self.rho * (1 - torch.where(total > 0, gains / total, 1 / self.k))

    def extra_repr(self) -> str:
        return f"{self.k}, rho={self.rho:g}"


def _positive(x: float, name: str) -> float:
    if not (math.isfinite(x) and x > 0):
        raise ValueError(f"{name} is {x}, expected a positive finite number")
    return float(x)
