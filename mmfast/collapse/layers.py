"""What the diagnostics need to know of a layer: whether it multiplies its input by its weight, and which of its dimensions are features."""

from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def multiplies(layer: nn.Module) -> bool:
    """Whether it is a linear layer or a plain convolution as torch has them: the gradient at its input is that at its output times its weight.

    One with a parametrization is not: reading its weight computes it, and may change what that keeps.
    """
    own = getattr(layer.forward, "__func__", None)
    if "weight" not in layer._parameters:
        return False
    if isinstance(layer, _CONVOLUTIONS):
        return layer.groups == 1 and own in [kind.forward for kind in _CONVOLUTIONS]
    return isinstance(layer, nn.Linear) and own is nn.Linear.forward


def matrix_of(weight: Tensor) -> Tensor:
    """The weight as [out, in]; a convolution's with the positions of a patch among its columns."""
    return weight.detach().flatten(1)


def rows_of(x: Tensor, layer: nn.Module) -> Tensor:
    """An input or output of the layer, or a gradient of one, as [rows, features]: a row for each sample and position."""
    if isinstance(layer, _CONVOLUTIONS):
        x = x.movedim(-1 - len(layer.kernel_size), -1)
    return x.reshape(-1, x.shape[-1])


def checked(layer: object, name: str) -> nn.Module:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{name} is a {type(layer).__name__}, expected an nn.Module")
    if isinstance(layer, _CONVOLUTIONS) and layer.groups != 1:
        raise TypeError(f"{name} is a convolution in {layer.groups} groups, each with columns of its own; expected one with groups=1")
    return layer
