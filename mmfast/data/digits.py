"""Digits as images: MNIST and SVHN from their original files, and SVHN*, a stand-in for SVHN that is made from MNIST."""

import io

import torch
from torch import Tensor

from mmfast.data import files
from mmfast.data.table import DataError

PARTS = ("train", "test")

_MNIST = {  # digests of what is in the .gz files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_SVHN = {"train": "md5:e26dedcc434d2e4c54c9b2d4a06d8373", "test": "md5:eb5a983be6a315427106f1b164d9cef3"}
_DRAWS = 15  # numbers that place and colour one image of SVHN*, before those of its texture
_COARSE = 4  # points of the coarse texture along a side


def mnist(part: str) -> tuple[Tensor, Tensor]:
    """MNIST (LeCun et al., 1998).

    Args:
        part: "train" or "test".

    Returns:
        Images uint8 [60000 or 10000, 28, 28] and labels int64.

    Raises:
        DataError: a file that cannot be had or has another checksum.
    """
    _check_part(part)
    start = "train" if part == "train" else "t10k"
    images = _mnist_file(f"{start}-images-idx3-ubyte", 16).view(-1, 28, 28)
    return images, _mnist_file(f"{start}-labels-idx1-ubyte", 8).long()


def _mnist_file(name: str, header: int) -> Tensor:
    address = f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz"
    return torch.frombuffer(bytearray(files.content("MNIST", f"MNIST/{name}.gz", _MNIST[name], address)), dtype=torch.uint8, offset=header)


def svhn_file(part: str) -> str:
    """Where a part of SVHN is, below a data folder."""
    return f"SVHN/{part}_32x32.mat"


def svhn(part: str) -> tuple[Tensor, Tensor]:
    """SVHN (Netzer et al., 2011), cropped digits.

    Args:
        part: "train" or "test".

    Returns:
        Images uint8 [73257 or 26032, 3, 32, 32] and labels int64, 0 to 9.

    Raises:
        DataError: a file that cannot be had or has another checksum, or scipy is missing.
    """
    _check_part(part)
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("SVHN comes as .mat files, which scipy reads: pip install 'mmfast[train]'") from None
    address = f"http://ufldl.stanford.edu/housenumbers/{part}_32x32.mat"
    found = loadmat(io.BytesIO(files.content("SVHN", svhn_file(part), _SVHN[part], address)))
    images, labels = torch.from_numpy(found["X"]), torch.from_numpy(found["y"]).long().flatten()
    return images.permute(3, 2, 0, 1).contiguous(), labels % 10  # a zero is labelled 10 there


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, expected one of {', '.join(PARTS)}")


def svhn_star(digits: Tensor, which: Tensor, seed: int) -> Tensor:
    """Pictures in the manner of SVHN, made from MNIST: a coloured digit on textured ground, fragments of two others at its sides.

    A stand-in for where SVHN is not to be had, called SVHN*; numbers made with it can't be compared with numbers made with SVHN.

    Args:
        digits: uint8 [n, 28, 28], of which the digits and the fragments are taken.
        which: int64 [m], the digits in the middle.
        seed: of places, colours and textures.

    Returns:
        uint8 [m, 3, 32, 32]; each depends on `digits`, its place there and the seed alone.

    Example:
        >>> digits = torch.randint(0, 256, (10, 28, 28), dtype=torch.uint8)
        >>> svhn_star(digits, torch.tensor([3, 4]), seed=0).shape
        torch.Size([2, 3, 32, 32])
    """
    return torch.cat([_street(digits, part, seed) for part in which.split(1000)])  # a few hundred megabytes at most


def _street(digits: Tensor, which: Tensor, seed: int) -> Tensor:
    fine = 3 * 32 * 32
    size = _DRAWS + 3 * _COARSE**2 + fine
    draws = torch.stack([torch.rand(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + i)) for i in which.tolist()])
    u, coarse, grain = draws.split([_DRAWS, 3 * _COARSE**2, fine], 1)

    def between(column: int, low: int, high: int) -> Tensor:
        """Whole numbers from low to high."""
        return low + (u[:, column] * (high + 1 - low)).long().clamp(max=high - low)

    ink = _placed(digits[which], between(0, 0, 4), between(1, 0, 4))
    for side, first in ((-1, 2), (1, 5)):  # the centre of a neighbour is 17 to 23 pixels away
        neighbour = digits[between(first, 0, len(digits) - 1)]
        ink = torch.maximum(ink, _placed(neighbour, between(first + 1, 0, 4), 2 + side * between(first + 2, 17, 23)))
    base = 0.15 + 0.3 * u[:, 8:9] + 0.2 * (u[:, 9:12] - 0.5)  # muted and dark
    away = 0.4 + 0.2 * u[:, 12:15]
    texture = torch.nn.functional.interpolate(coarse.view(-1, 3, _COARSE, _COARSE), (32, 32), mode="bilinear", align_corners=True)
    ground = base[..., None, None] + 0.2 * (texture - 0.5) + 0.08 * (grain.view(-1, 3, 32, 32) - 0.5)
    pictures = ground + ink.unsqueeze(1) / 255 * away[..., None, None]
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def _placed(digits: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Digits uint8 [m, 28, 28] on empty pictures [m, 32, 32], float; what lies outside is cut off."""
    rows, columns = (torch.arange(32) - start.unsqueeze(1) for start in (top, left))
    inside = ((rows >= 0) & (rows < 28)).unsqueeze(2) & ((columns >= 0) & (columns < 28)).unsqueeze(1)
    index = torch.arange(len(digits))[:, None, None], rows.clamp(0, 27).unsqueeze(2), columns.clamp(0, 27).unsqueeze(1)
    return digits[index] * inside.float()
