"""MNIST-SVHN-Text: files, pairs, words, and the stand-in for SVHN."""

import gzip
import hashlib
import http.server
import threading

import made_digits
import pytest
import torch

from mmfast.data import DataError, digits, files, triplets, words

needs_mnist = pytest.mark.skipif(files.find("MNIST/train-images-idx3-ubyte.gz") is None, reason="MNIST is not here; set MMFAST_DATA")


# pairs


def pairs(most, repeats, seed=0):
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randint(0, 4, (50,), generator=generator), torch.randint(0, 4, (37,), generator=generator)
    return a, b, *triplets.pair(a, b, most, repeats, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("most", [1, 5, 10_000])
def test_pairs_are_of_one_label_and_each_of_the_first_n_comes_once_in_a_round(most):
    a, b, i, j = pairs(most, 1)
    assert torch.equal(a[i], b[j])
    for label in range(4):
        of_a, of_b = ([k for k, x in enumerate(labels.tolist()) if x == label] for labels in (a, b))
        n = min(len(of_a), len(of_b), most)
        chosen = a[i] == label
        assert sorted(i[chosen].tolist()) == of_a[:n] and sorted(j[chosen].tolist()) == of_b[:n]


def test_each_round_pairs_anew():
    i, j = pairs(6, 20)[2:]
    assert len(i) == 20 * len(pairs(6, 1)[2])
    counts = torch.stack([i, j]).unique(dim=1, return_counts=True)[1]
    assert counts.max() < 12  # of 20 rounds among 6 partners
    assert all(n == 20 for of in (i, j) for n in of.bincount()[of.unique()].tolist())


def test_pairs_depend_on_the_seed_alone():
    assert all(torch.equal(x, y) for x, y in zip(pairs(5, 2), pairs(5, 2), strict=True))
    assert not torch.equal(pairs(5, 2)[2], pairs(5, 2, seed=1)[2])


def test_the_split_is_disjoint_and_whole(monkeypatch):
    made_digits.use(monkeypatch)
    whole = triplets.load(triplets.STAND_IN, "train", 0, 10, 2)
    train, validation = triplets.split(whole, 3)
    assert (len(train), len(validation)) == (180, 20)
    both = torch.cat([torch.stack([part.first, part.second]) for part in (train, validation)], 1)
    order = [sorted(map(tuple, of.T.tolist())) for of in (both, torch.stack([whole.first, whole.second]))]
    assert order[0] == order[1]
    assert torch.equal(triplets.split(whole, 3)[0].first, train.first) and not torch.equal(triplets.split(whole, 4)[0].first, train.first)
    with pytest.raises(DataError, match="too few"):
        triplets.split(whole.part(torch.tensor([0])), 0)


# words


def test_the_alphabet_is_the_published_one():
    assert len(words.ALPHABET) == 71 and len(set(words.ALPHABET)) == 70


def test_words_start_where_the_definition_says():
    labels, u = torch.arange(10).repeat(50), torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = [words.read(line) for line in words.words(labels, 5)]
    for line, label, draw in zip(found, labels.tolist(), u.tolist(), strict=True):
        word = words.WORDS[label]
        assert line == (" " * int(draw * (8 - 1 - len(word))) + word).ljust(8)
    assert {len(line) - len(line.lstrip()) for line, label in zip(found, labels.tolist(), strict=True) if label == 1} == {0, 1, 2, 3}


def test_one_hot_text_has_one_character_at_each_place():
    codes = words.words(torch.tensor([8]), 0)
    x = words.one_hot(codes)
    assert x.shape == (1, 8, 71) and x.dtype == torch.float32 and torch.equal(x.argmax(-1), codes.long()) and x.sum() == 8


# the stand-in


def test_the_stand_in_is_made_of_other_images_than_mnist(monkeypatch):
    made_digits.use(monkeypatch)
    seen = []
    make = digits.svhn_star
    monkeypatch.setattr(digits, "svhn_star", lambda pool, which, seed: seen.append(pool) or make(pool, which, seed))
    for part in digits.PARTS:
        data = triplets.load(triplets.STAND_IN, part, 0, 5, 1)
        images, labels = made_digits.make(part)
        pool = {bytes(image.flatten().tolist()) for image in seen[-1]}
        own = {bytes(image.flatten().tolist()) for image in data.mnist}
        assert len(pool) == len(own) == len(images) // 2 and not pool & own
        assert torch.equal(labels[::2][data.first], data.labels)
    assert not torch.equal(*(triplets.load(triplets.STAND_IN, part, 0, 2, 1).svhn[:10] for part in digits.PARTS))


def test_the_stand_in_has_its_digit_in_the_middle_and_is_always_the_same():
    pool = made_digits.make("train")[0]
    which = torch.tensor([5, 17, 100])
    found = digits.svhn_star(pool, which, 0)
    assert found.dtype == torch.uint8 and found.shape == (3, 3, 32, 32)
    assert torch.equal(found, digits.svhn_star(pool, which, 0)) and torch.equal(found[1:2], digits.svhn_star(pool, which[1:2], 0))
    assert not torch.equal(found, digits.svhn_star(pool, which, 1))
    # the digit's own pixels are brighter than the ground wherever it was put
    for image, i in zip(found.double().mean(1), which.tolist(), strict=True):
        best = -torch.inf
        for top in range(5):
            for left in range(5):
                mask = torch.zeros(32, 32, dtype=torch.bool)
                mask[top : top + 28, left : left + 28] = pool[i] > 100
                best = max(best, (image[mask].mean() - image[~mask].mean()).item())
        assert best > 40
    assert found.double().std((1, 2, 3)).min() > 20 and len(found.flatten(1).unique(dim=0)) == 3


def test_a_batch_is_what_a_model_takes(monkeypatch):
    made_digits.use(monkeypatch)
    data = triplets.load(triplets.STAND_IN, "train", 0, 4, 1)
    x = data.batch(torch.arange(7))
    assert {name: tuple(v.shape) for name, v in x.items()} == {"mnist": (7, 1, 28, 28), "svhn": (7, 3, 32, 32), "text": (7, 8, 71)}
    assert all(v.dtype == torch.float32 and v.min() >= 0 and v.max() <= 1 for v in x.values())
    assert torch.equal(x["svhn"] * 255, data.svhn[data.second[:7]].float()) and not torch.equal(data.first[:7], data.second[:7])
    told = [words.WORDS.index(words.read(line).strip()) for line in x["text"].argmax(-1)]
    assert told == data.labels[:7].tolist()
    again = triplets.load(triplets.STAND_IN, "train", 1, 4, 1)
    assert not torch.equal(again.first, data.first) and torch.equal(again.svhn.sum(), data.svhn.sum())


def test_an_unknown_set_is_refused():
    with pytest.raises(DataError, match="expected one of MNIST-SVHN-Text, MNIST-SVHN"):
        triplets.load("MST", "train", 0)
    with pytest.raises(ValueError, match="part is 'extra'"):
        digits.mnist("extra")


# files


def test_svhn_is_read_from_its_own_files(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.setenv("MMFAST_DATA", str(tmp_path))
    made_digits.use(monkeypatch)
    (tmp_path / "SVHN").mkdir()
    assert triplets.here() == triplets.STAND_IN
    made = {}
    for part in digits.PARTS:
        images = torch.randint(0, 256, (32, 32, 3, 30), dtype=torch.uint8)  # rows, columns, colours, images
        labels = torch.arange(30) % 10 + 1  # a zero is a ten
        scipy_io.savemat(tmp_path / digits.svhn_file(part), {"X": images.numpy(), "y": labels.numpy()[:, None]})
        made[part] = images
        digest = hashlib.md5((tmp_path / digits.svhn_file(part)).read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(digits._SVHN, part, f"md5:{digest}")
    found, labels = digits.svhn("train")
    assert torch.equal(found[3, 1], made["train"][:, :, 1, 3]) and labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert triplets.here() == triplets.REAL
    data = triplets.load(triplets.REAL, "train", 0)
    assert torch.equal(labels[data.second], data.labels) and len(data) == 20 * 30 and len(data.mnist) == 240
    monkeypatch.setitem(digits._SVHN, "train", "md5:" + "0" * 32)
    with pytest.raises(DataError, match="has md5 .* expected 0000"):
        digits.svhn("train")


class Handler(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


def test_a_packed_file_is_downloaded_as_it_is(tmp_path, monkeypatch):
    pytest.importorskip("pooch")
    monkeypatch.delenv("MMFAST_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Handler, "content", gzip.compress(b"digits"))
    digest = hashlib.sha256(b"digits").hexdigest()
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{serving.server_port}/digits.gz"
        with pytest.raises(DataError, match="another version of Made"):
            files.content("Made", "Made/digits.gz", "0" * 64, address)
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        assert files.content("Made", "Made/digits.gz", digest, address) == b"digits"
        serving.shutdown()
    assert (files.folders()[0] / "Made/digits.gz").read_bytes() == Handler.content
    assert files.content("Made", "Made/digits.gz", digest, address) == b"digits"


def test_without_pooch_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"pooch, which downloads it, is not installed: pip install 'mmfast\[train\]'"):
        files.content("Made", "Made/digits.gz", "", "http://127.0.0.1:9/digits.gz")


@needs_mnist
def test_mnist_itself():
    images, labels = digits.mnist("test")
    assert images.shape == (10_000, 28, 28) and labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
