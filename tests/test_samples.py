"""Data sets of several modalities: splits, groups of columns, avMNIST's pairs and sounds, the planted set."""

import csv
import hashlib
import lzma
import sys
import wave
from dataclasses import replace

import pytest
import torch

from mmfast import data
from mmfast.data import DataError, avmnist, digits, files, modalities
from mmfast.data.samples import Samples, standardised, stratified

ROWS = 400


def parts(split):
    return split.train, split.valid, split.test


# rows and splits


def rows(n=6):
    inputs = {"a": torch.arange(2.0 * n).view(n, 2), "b": torch.arange(3.0 * n).view(n, 1, 3)}
    return Samples(inputs, {"a": torch.arange(n) > 1, "b": torch.arange(n) != 4}, torch.arange(n) % 3)


def test_a_part_has_the_rows_that_are_asked_for():
    whole, index = rows(), torch.tensor([4, 0, 1])
    for part in (whole.part(index), whole.part(index).part(torch.tensor([True, True, True]))):
        assert len(part) == 3 and part.target.tolist() == [1, 0, 1]
        assert part.inputs["a"].tolist() == [[8, 9], [0, 1], [2, 3]] and part.inputs["b"][:, 0, 0].tolist() == [12, 0, 3]
        assert part.present["a"].tolist() == [True, False, False] and part.present["b"].tolist() == [False, True, True]
    part.inputs["a"].zero_()
    assert whole.inputs["a"][4].tolist() == [8, 9]


def test_rows_that_do_not_agree_are_refused():
    whole = rows()
    with pytest.raises(ValueError, match="present has the modalities a, expected a, b"):
        Samples(whole.inputs, {"a": whole.present["a"]}, whole.target)
    with pytest.raises(ValueError, match=r"inputs\['b'\] has 5 rows, expected 6"):
        Samples(whole.inputs | {"b": torch.zeros(5)}, whole.present, whole.target)
    with pytest.raises(ValueError, match=r"present\['a'\] has 5 rows, expected 6"):
        Samples(whole.inputs, whole.present | {"a": torch.ones(5, dtype=torch.bool)}, whole.target)


@pytest.mark.parametrize("n", [1, 7, 100, 1009])
def test_every_part_has_its_share_of_each_group(n):
    groups = torch.randint(0, 4, (n,)) ** 2
    torch.manual_seed(5)
    found = stratified(groups, (0.7, 0.8), 3)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))  # the caller's stream is left alone
    assert sorted(torch.cat(found).tolist()) == list(range(n))
    for group in groups.unique():
        count = [int((groups[part] == group).sum()) for part in found]
        size = sum(count)
        assert all(abs(c - share * size) <= 1 for c, share in zip(count, (0.7, 0.1, 0.2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, stratified(groups, (0.7, 0.8), 3), strict=True))
    if n > 50:
        assert not torch.equal(found[0], stratified(groups, (0.7, 0.8), 4)[0])
        assert not torch.equal(found[0], found[0].sort().values)


@pytest.mark.parametrize("cuts", [(0.8, 0.2), (-0.1,), (0.5, 1.2), (float("nan"),)])
def test_cuts_that_do_not_increase_are_refused(cuts):
    with pytest.raises(ValueError, match=r"cuts is .*, expected increasing shares in \[0, 1\]"):
        stratified(torch.zeros(10, dtype=torch.int64), cuts, 0)


def test_a_mask_is_bool():
    with pytest.raises(ValueError, match=r"present\['a'\] is torch.float32, expected bool"):
        Samples({"a": torch.zeros(2, 1)}, {"a": torch.ones(2)}, torch.zeros(2, dtype=torch.int64))


def test_columns_are_standardised_by_the_training_rows():
    x = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e6]) + 7
    x[:, 1] = 7
    x[45, 1] = 9  # not a training row
    train = torch.randperm(40)
    found = standardised(x, train)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[train].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[train].std(0), torch.tensor([1.0, 0.0, 1.0]))
    assert found[45, 1] == 2
    torch.testing.assert_close(found[:, 2].diff(), (x[:, 2].diff() / x[:40, 2].std()).float())
    assert standardised(x, torch.tensor([3]))[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456, 1e6 + 0.1, -7.7])
@pytest.mark.parametrize("rows", [10, 100, 1000, 7001])
def test_a_constant_whose_deviation_is_rounding_is_only_centred(value, rows):
    x = torch.full((rows + 1, 1), value, dtype=torch.float64)
    x[-1] = value + 5  # not a training row
    found = standardised(x, torch.arange(rows))
    assert found[:-1].abs().max() < 1e-9 and found[-1].item() == pytest.approx(5)


# tables


def specs(name):
    """Name, kind and number of classes of each column of the file, None of one that is left out."""
    for spec in data.SETS[name].columns.split(","):
        title, kind, *classes = spec.split()
        yield title, kind, 2 if kind == "binary" else int(classes[0]) if classes else 0


@pytest.fixture(params=["Credit", "Bank"])
def made(request, tmp_path, monkeypatch):
    """A made-up file of the set, and a function that writes it: numbers that are the rows' own, classes at random."""
    name = request.param
    generator = torch.Generator().manual_seed(1)
    columns = {}
    for place, (title, kind, classes) in enumerate(specs(name)):
        column = (
            torch.randint(0, classes, (ROWS,), generator=generator) if classes else (place + 2) * torch.randperm(ROWS, generator=generator)
        )
        if classes:
            column[:classes] = torch.arange(classes)  # the smallest class is there
        columns[title] = column
    columns[modalities.GROUPS[name][1]] = (torch.arange(ROWS) % 5 == 0).long()
    source = replace(data.SETS[name], sha256="", rows=ROWS)
    monkeypatch.setitem(data.SETS, name, source)
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / source.file.removesuffix(".gz")
    path.parent.mkdir()
    monkeypatch.setitem(data.SETS, name, replace(source, file=path.relative_to(tmp_path).as_posix()))

    def write():
        with path.open("w", newline="") as out:
            table = csv.writer(out)
            if source.header:
                table.writerow(columns)
            table.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))

    write()
    return name, columns, write


UNIQUE = {"Credit": ("demographics", "limit", 0), "Bank": ("contact", "duration", -1)}  # a number by which a row is known


def places(name, columns, split):
    """Which rows of the file are in the parts, by the order of a number that is different in all."""
    modality, title, column = UNIQUE[name]
    x = torch.cat([part.inputs[modality][:, column] for part in parts(split)])
    found = torch.empty(ROWS, dtype=torch.int64)
    found[x.argsort()] = columns[title].argsort()
    return found.split([len(part) for part in parts(split)])


def test_modalities_are_groups_of_columns(made):
    name, columns, _ = made
    split = modalities.load(name, 2)
    where = places(name, columns, split)
    assert sorted(torch.cat(where).tolist()) == list(range(ROWS)) and (split.name, split.classes) == (name, 2)
    groups, label = modalities.GROUPS[name]
    classes = {title: n for title, _, n in specs(name)}
    for part, index in zip(parts(split), where, strict=True):
        assert torch.equal(part.target, columns[label][index]) and part.target.dtype == torch.int64
        assert list(part.inputs) == list(part.present) == list(groups)
        for modality, titles in groups.items():
            expected = []
            for title in titles:
                x = columns[title]
                if classes[title]:
                    expected += [(x[index] == c).double() for c in range(classes[title])]
                else:
                    train = x[where[0]].double()
                    expected.append((x[index] - train.mean()) / train.std())
            torch.testing.assert_close(part.inputs[modality], torch.stack(expected, 1).float())
            assert part.present[modality].all() and part.present[modality].dtype == torch.bool
    assert [len(part) for part in parts(split)] == [280, 40, 80] and [int(part.target.sum()) for part in parts(split)] == [56, 8, 16]


@pytest.mark.parametrize("name,sizes", [("Credit", (5, 6, 6, 6)), ("Bank", (7, 4, 4, 5))])
def test_every_column_but_the_label_is_in_one_modality(name, sizes):
    groups, label = modalities.GROUPS[name]
    assert tuple(map(len, groups.values())) == sizes
    used = [title for titles in groups.values() for title in titles]
    assert sorted([*used, label]) == sorted(title for title, kind, _ in specs(name) if kind != "-")


def test_other_rows_do_not_reach_the_training_rows(made):
    name, columns, write = made
    before = modalities.load(name, 2)
    test = places(name, columns, before)[2]
    for title, _, classes in specs(name):
        if not classes:
            columns[title][test] *= 10**6
    write()
    after = modalities.load(name, 2)
    for modality, x in before.train.inputs.items():
        assert torch.equal(x, after.train.inputs[modality]) and torch.equal(before.valid.inputs[modality], after.valid.inputs[modality])
    assert sum(x.abs().max() > 1e5 for x in after.test.inputs.values()) == {"Credit": 3, "Bank": 4}[name]


def test_the_seed_alone_chooses_the_rows(made):
    name, columns, _ = made
    first, again, other = (places(name, columns, modalities.load(name, seed)) for seed in (2, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(
        first[2].sort().values, other[2].sort().values
    )


@pytest.mark.parametrize("name,sizes,share", [("Credit", [21000, 3000, 6000], 0.2212), ("Bank", [28832, 4118, 8238], 0.1127)])
def test_the_tables_themselves(name, sizes, share):
    if files.find(data.SETS[name].file) is None:
        pytest.skip(f"{name} is not in {files.folders()[0]}; set MMFAST_DATA")
    split = modalities.load(name, 0)
    assert [len(part) for part in parts(split)] == sizes
    for part in parts(split):
        assert float(part.target.double().mean()) == pytest.approx(share, abs=2e-4)
        assert all(x.isfinite().all() for x in part.inputs.values())


# avMNIST

SMIL = [f"{speaker}_{i}" for speaker in ("jackson", "nicolas", "theo") for i in range(50)]


def code(digit, take):
    return 150 * digit + SMIL.index(take)


@pytest.fixture
def coded(monkeypatch):
    """Images that hold their place in MNIST, and sounds whose MFCC is their number."""

    def mnist(part):
        n = 1400 if part == "train" else 600
        images = torch.zeros(n, 28, 28, dtype=torch.uint8)
        images[:, 0, 0], images[:, 0, 1] = torch.arange(n) // 256, torch.arange(n) % 256
        return images, torch.arange(n) * 7 % 10

    monkeypatch.setattr(digits, "mnist", mnist)
    takes = {(d, t.split("_")[0], int(t.split("_")[1])): torch.tensor([float(code(d, t))]) for d in range(10) for t in SMIL}
    monkeypatch.setattr(avmnist, "recordings", lambda: takes)
    monkeypatch.setattr(avmnist, "mfcc", lambda take: take.expand(20, 20))


def seen(part):
    """(place of the image, number of the sound or None, digit) of each row."""
    assert part.inputs["image"].shape[1:] == (1, 28, 28) and part.inputs["audio"].shape[1:] == (1, 20, 20) and part.present["image"].all()
    pixel = (part.inputs["image"][:, 0, 0, :2] * 0.5 + 0.5) * 255
    place = (pixel @ torch.tensor([256.0, 1.0])).round().long().tolist()
    sound = part.inputs["audio"]
    assert torch.equal(sound.amax((1, 2, 3)), sound.amin((1, 2, 3)))
    number = ((sound[:, 0, 3, 4] + 1) / 2).long().tolist()
    return {
        (i, a if there else None, y)
        for i, a, there, y in zip(place, number, part.present["audio"].tolist(), part.target.tolist(), strict=True)
    }


@pytest.mark.parametrize("audio", [3, 15, 105])
def test_pairs_are_those_of_smil(coded, audio):
    """By the names of SMIL's files, sorted: 1000.png before 101.png, jackson_10.wav before jackson_2.wav."""
    split = avmnist.load(0, audio)
    train, test = set(), set()
    for digit in range(10):
        names = {part: sorted(f"{i}.png" for i in range(n) if i * 7 % 10 == digit) for part, n in (("train", 1400), ("test", 600))}
        heard = [t for s in ("jackson", "nicolas", "theo") for t in [f"{s}_{i}" for i in range(15, 50)][: audio // 3]]
        train |= {(int(name[:-4]), code(digit, t), digit) for name, t in zip(names["train"], heard, strict=False)}
        train |= {(int(name[:-4]), None, digit) for name in names["train"][audio:105]}
        takes = sorted(f"{digit}_{s}_{i}.wav" for s in ("jackson", "nicolas", "theo") for i in range(15))
        test |= {(int(name[:-4]), code(digit, t[2:-4]), digit) for name, t in zip(names["test"][-45:], takes, strict=True)}
    assert seen(split.train) | seen(split.valid) == train and len(split.train) + len(split.valid) == len(train) == 1050
    assert seen(split.test) == test and len(split.test) == len(test) == 450
    for part in (split.train, split.valid):
        assert not part.inputs["audio"][~part.present["audio"]].any()
    assert split.classes == 10 and split.name == "avMNIST"


def test_validation_has_a_tenth_of_each_digit_with_sound_and_without(coded):
    split, again, other = (modalities.load("avMNIST", seed) for seed in (0, 0, 1))
    for part, heard, alone in ((split.train, 13, 81), (split.valid, 2, 9)):
        for digit in range(10):
            there = part.present["audio"][part.target == digit]
            assert (int(there.sum()), int((~there).sum())) == (heard, alone)
    assert seen(split.valid) == seen(again.valid) != seen(other.valid) and seen(split.test) == seen(other.test)


def test_no_batch_is_of_one_digit(coded):
    """Else Grape, M3Care and MUSE, whose predictions depend on the batch, are told the label by the rows beside it."""
    split, again, other = (avmnist.load(seed) for seed in (0, 0, 1))
    for part in parts(split):
        assert all(len(batch.unique()) > 5 for batch in part.target[: len(part) // 32 * 32].view(-1, 32))
    assert torch.equal(split.test.target, again.test.target) and not torch.equal(split.test.target, other.test.target)


@pytest.mark.parametrize("audio", [0, 4, 108, 15.5, "all"])
def test_images_with_sound_are_a_multiple_of_three(coded, audio):
    with pytest.raises(ValueError, match=r"audio is .*, expected a multiple of 3 from 3 to 105"):
        avmnist.load(0, audio)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "FSDD/recordings").mkdir(parents=True)
    return tmp_path / "FSDD"


def write_wav(folder, name, samples, rate=8000, channels=1):
    with wave.open(str(folder / f"recordings/{name}.wav"), "wb") as out:
        out.setparams((channels, 2, rate, 0, "NONE", None))
        out.writeframes(samples.numpy().tobytes())


def test_recordings_come_from_wav_files_or_packed(folder, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    takes = {
        (d, s, i): torch.randint(-(2**15), 2**15, (3 + (d + i) % 4,), generator=generator).to(torch.int16)
        for d in range(10)
        for s in ("jackson", "nicolas", "theo")
        for i in range(50)
    }
    for (d, s, i), x in takes.items():
        write_wav(folder, f"{d}_{s}_{i}", x)
    from_wav = avmnist.recordings()
    (folder / "recordings").rename(folder / "gone")
    order = list(takes)[::-1]
    index = "digit,speaker,index,num_samples\n" + "".join(f"{d},{s},{i},{len(takes[d, s, i])}\n" for d, s, i in order)
    contents = lzma.compress(b"".join(takes[key].numpy().tobytes() for key in order)), index.encode()
    for file, content in zip(avmnist._PACKED, contents, strict=True):
        (folder.parent / file).write_bytes(content)
    with pytest.raises(DataError, match="truncated or another version of FSDD"):
        avmnist.recordings()
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in zip(avmnist._PACKED, contents, strict=True)}
    monkeypatch.setattr(avmnist, "_PACKED", digests)
    for found in (from_wav, avmnist.recordings()):
        assert found.keys() == takes.keys()
        assert all(torch.equal(found[key], takes[key].float() / 32768) for key in takes)


def test_what_is_wrong_with_a_recording_is_said(folder):
    with pytest.raises(DataError, match=r"0_jackson_0.wav.*put the folder recordings of https://github.com/Jakobovski"):
        avmnist.recordings()
    write_wav(folder, "0_jackson_0", torch.zeros(8, dtype=torch.int16), rate=16000, channels=2)
    with pytest.raises(DataError, match="0_jackson_0.wav has 2 channels, 2 bytes a sample and 16000 Hz, expected 1, 2 and 8000"):
        avmnist.recordings()
    for content in (b"", b"no sound at all"):
        (folder / "recordings/0_jackson_0.wav").write_bytes(content)
        with pytest.raises(DataError, match="0_jackson_0.wav cannot be read"):
            avmnist.recordings()


def direct(samples):
    """By hand what centred, mirrored frames are, and librosa for the rest."""
    import librosa
    import numpy as np

    mirrored = np.pad(samples.numpy()[::3], 1024, mode="reflect")
    found = torch.from_numpy(librosa.feature.mfcc(y=mirrored, sr=8000, n_mfcc=20, n_fft=2048, hop_length=512, center=False))
    return torch.cat([found, torch.zeros(20, 20)], 1)[:, :20]


@pytest.mark.parametrize("n", [1000, 5148, 18262, 40000])
def test_the_mfcc_is_librosas_of_every_third_sample(n):
    """400 samples and fewer are less than half a frame; 30,720 and more are cut to 20 frames."""
    pytest.importorskip("librosa")
    samples = torch.randn(n, generator=torch.Generator().manual_seed(n)) / 9
    found = avmnist.mfcc(samples)
    assert found.shape == (20, 20) and found.dtype == torch.float32
    torch.testing.assert_close(found, direct(samples), rtol=1e-4, atol=1e-3)
    assert not found[:, 1 + (n + 2) // 3 // 512 :].any() and found[:, min(19, n // 3 // 512)].any()


def test_librosa_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(DataError, match=r"librosa: pip install 'mmfast\[train\]'"):
        avmnist.mfcc(torch.zeros(2000))


def test_avmnist_itself():
    if not all(files.find(file) for file in (*avmnist._PACKED, "MNIST/train-images-idx3-ubyte.gz", "MNIST/t10k-images-idx3-ubyte.gz")):
        pytest.skip(f"MNIST and FSDD are not in {files.folders()[0]}; set MMFAST_DATA")
    pytest.importorskip("librosa")
    takes = avmnist.recordings()
    assert len(takes) == 1500 and sum(map(len, takes.values())) == 5018040
    split = modalities.load("avMNIST", 0)
    assert [len(part) for part in parts(split)] == [940, 110, 450]
    assert [int(part.present["audio"].sum()) for part in parts(split)] == [130, 20, 450]
    first = torch.cat([part.inputs["image"][part.target == 3] for part in (split.train, split.valid)])
    images, labels = digits.mnist("train")
    names = sorted(f"{i}.png" for i in (labels == 3).nonzero().flatten().tolist())[:105]
    expected = torch.stack([images[int(name[:-4])] for name in names]) / 127.5 - 1
    torch.testing.assert_close(first.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    torch.testing.assert_close(
        avmnist._test(takes).inputs["audio"][45 * 3 + 2, 0], 2 * direct(takes[3, "jackson", 10]) - 1, rtol=1e-4, atol=1e-3
    )


def test_an_unknown_name_lists_the_known():
    with pytest.raises(DataError, match="expected one of Credit, Bank, avMNIST, planted, MIMIC-IV"):
        modalities.load("credit", 0)
