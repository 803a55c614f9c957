"""avMNIST: 1,500 images of digits with spoken digits, made of MNIST and the Free Spoken Digit Dataset as SMIL does (Ma et al., AAAI 2021)."""

import csv
import io
import lzma
import warnings
import wave
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.data import digits, files
from mmfast.data.samples import Samples, Split, stratified
from mmfast.data.table import DataError

SPEAKERS = ("jackson", "nicolas", "theo")
RATE = 8000  # of the recordings, Hz
TAKES, TEST_TAKES = 50, 15  # recordings of a digit by a speaker, and those of them that are for the test
FRAMES = 20  # of the MFCC, filled up with zeros
_SOURCE = "the folder recordings of https://github.com/Jakobovski/free-spoken-digit-dataset"
_PACKED = {  # all recordings one after the other, int16, and the table that says where each begins
    "FSDD/fsdd_3spk_1500_int16le_8khz.raw.xz": "cfab7db0f851bcf6f09534a73abc8d8061df7c24f62a9cc3839022161a9bc054",
    "FSDD/index.csv": "8cb91ce67cc39bde1a9e3ec81f0a1b7cc316e59fcfe3541170bbce567a970791",
}

Take = tuple[int, str, int]  # digit, speaker, number


def load(seed: int, audio: int = 15) -> Split:
    """avMNIST, where most images of the training rows have no sound.

    Training: of each digit 105 images of MNIST's training part, 35 recordings of each speaker. Test: 45 images of its test part, 15 recordings of each
    speaker, all present. Images and recordings are paired by their places, in the order of SMIL's file names. SMIL chooses its epoch by the test rows;
    here a tenth of the training rows is for validation. Rows are in random order: batches of one digit would give its label away to systems whose
    predictions depend on the batch.

    Args:
        seed: of the order, and of the validation rows, which hold a tenth of each digit's images with sound, and of those without.
        audio: training images of each digit that have sound, a third of them from each speaker: a multiple of 3 up to 105. The others are alone.

    Returns:
        A `Split` with "image" float32 [n, 1, 28, 28] and "audio" float32 [n, 1, 20, 20], the MFCC, both through (x - .5) / .5; zero where absent.

    Raises:
        DataError: a file that cannot be had or is another, or librosa is missing.
        ValueError: `audio` is something else.

    Example:
        >>> split = load(seed=0)  # doctest: +SKIP
        >>> len(split.train), int(split.train.present["audio"].sum()), len(split.valid), len(split.test)  # doctest: +SKIP
        (940, 130, 110, 450)
    """
    most = len(SPEAKERS) * (TAKES - TEST_TAKES)
    if audio not in range(3, most + 1, 3):
        raise ValueError(f"audio is {audio!r}, expected a multiple of 3 from 3 to {most}")
    takes = recordings()
    rows = _train(takes, audio)
    groups = 2 * rows.target + rows.present["audio"]
    valid, train = stratified(groups, (0.1,), seed)
    test = _test(takes)
    mixed = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    return Split(rows.part(train), rows.part(valid), test.part(mixed), 10, "avMNIST")


def recordings() -> dict[Take, Tensor]:
    """The recordings by digit, speaker and number, float32 in [-1, 1), from `FSDD/recordings/*.wav` or the two packed files.

    Raises:
        DataError: a file that cannot be had, or is another.
    """
    if all(files.find(file) for file in _PACKED):
        return _unpacked()
    return {
        (digit, speaker, number): _wav(f"FSDD/recordings/{digit}_{speaker}_{number}.wav")
        for digit in range(10)
        for speaker in SPEAKERS
        for number in range(TAKES)
    }


def _unpacked() -> dict[Take, Tensor]:
    packed, index = (files.content("FSDD", file, digest) for file, digest in _PACKED.items())
    samples = _numbers(lzma.decompress(packed))
    found, start = {}, 0
    for row in csv.DictReader(io.StringIO(index.decode())):
        end = start + int(row["num_samples"])
        found[int(row["digit"]), row["speaker"], int(row["index"])] = samples[start:end]
        start = end
    return found


def _numbers(samples: bytes) -> Tensor:
    return torch.frombuffer(bytearray(samples), dtype=torch.int16) / 2**15


def _wav(file: str) -> Tensor:
    content = files.content("FSDD", file, "", source=_SOURCE)
    try:
        with wave.open(io.BytesIO(content)) as read:
            found = read.getnchannels(), read.getsampwidth(), read.getframerate()
            samples = read.readframes(read.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error or 'it is empty'}") from None
    if found != (1, 2, RATE):
        raise DataError(f"{file} has {found[0]} channels, {found[1]} bytes a sample and {found[2]} Hz, expected 1, 2 and {RATE}")
    return _numbers(samples)


def mfcc(samples: Tensor) -> Tensor:
    """The 20 x 20 MFCC of a recording: of every third sample, taken for 8 kHz, in frames of 2048 that start every 512.

    At the ends the sound is mirrored, as librosa did at SMIL's version, 0.7.0; today it is silent there unless told.

    Args:
        samples: float32 [n].

    Returns:
        float32 [20, 20]; frames beyond the sound are zero.

    Raises:
        DataError: librosa is missing.
    """
    try:
        import librosa
    except ImportError:
        raise DataError("the sounds of avMNIST go through librosa: pip install 'mmfast[train]'") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_fft=.* is too large", category=UserWarning)  # most are shorter than a frame
        found = librosa.feature.mfcc(y=samples[::3].numpy(), sr=RATE, n_mfcc=20, pad_mode="reflect")
    return F.pad(torch.from_numpy(found), (0, FRAMES - found.shape[1]))  # cuts where that is negative


def _train(takes: Mapping[Take, Tensor], audio: int) -> Samples:
    """The first 105 images of each digit; the first `audio` of them with sound, speaker by speaker."""
    most = len(SPEAKERS) * (TAKES - TEST_TAKES)
    share = audio // len(SPEAKERS)
    images: list[Tensor] = []
    chosen: list[Tensor | None] = []
    pictures, labels = digits.mnist("train")
    for digit in range(10):
        images.append(pictures[_by_name(labels, digit)[:most]])
        chosen += [takes[digit, speaker, TEST_TAKES + i] for speaker in SPEAKERS for i in range(share)]
        chosen += [None] * (most - audio)
    return _rows(torch.cat(images), chosen)


def _test(takes: Mapping[Take, Tensor]) -> Samples:
    """The last 45 images of each digit, with the other recordings in the order of their names, in which 10 comes before 2."""
    images, chosen = [], []
    pictures, labels = digits.mnist("test")
    for digit in range(10):
        images.append(pictures[_by_name(labels, digit)[-len(SPEAKERS) * TEST_TAKES :]])
        chosen += [takes[digit, speaker, int(i)] for speaker in SPEAKERS for i in sorted(map(str, range(TEST_TAKES)))]
    return _rows(torch.cat(images), chosen)


def _by_name(labels: Tensor, digit: int) -> Tensor:
    """Places of a digit's images in the order of SMIL's file names, the place in MNIST and ".png", in which 10 comes before 2."""
    return torch.tensor(sorted((labels == digit).nonzero().squeeze(1).tolist(), key=lambda i: f"{i}.png"))


def _rows(images: Tensor, takes: Sequence[Tensor | None]) -> Samples:
    there = torch.tensor([take is not None for take in takes])
    audio = torch.zeros(len(takes), 1, 20, FRAMES)
    audio[there, 0] = 2 * torch.stack([mfcc(take) for take in takes if take is not None]) - 1
    inputs = {"image": (images.unsqueeze(1) / 255 - 0.5) / 0.5, "audio": audio}
    target = torch.arange(10).repeat_interleave(len(takes) // 10)
    return Samples(inputs, {"image": torch.ones(len(takes), dtype=torch.bool), "audio": there}, target)
