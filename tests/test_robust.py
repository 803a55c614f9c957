"""Krum beyond the laws of test_rules.py."""

import pytest
import torch
from problems import gramian

from mmfast import ops
from mmfast.resolvers import Krum

BACKENDS = ["auto", "reference"]


def resolved(J, rule, backend, mask=None):
    return ops.weights(J @ J.mT, rule, mask, backend=backend) @ J


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", ["squared", "plain"])
def test_outliers_are_left_out(distance, backend):
    honest = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + 0.01 * torch.randn(6, 3, dtype=torch.float64)
    J = torch.cat([torch.tensor([[100.0, -50.0, 3.0], [-1.0, -2.0, -3.0]], dtype=torch.float64), honest])
    for n_selected in (1, 4):
        rule = Krum(2, n_selected=n_selected, distance=distance)
        assert (resolved(J, rule, backend) - honest.mean(0)).abs().max() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_and_squared_distances_differ(backend):
    """Two nearest at 0.1 and 5 or at 3 and 3: the first sum is less for plain distances, the second for squared ones."""
    J = torch.tensor([[5.0], [10.0], [10.1], [30.0], [33.0], [36.0]], dtype=torch.float64)
    assert resolved(J, Krum(2, distance="plain"), backend) == 10
    assert resolved(J, Krum(2), backend) == 33


def test_every_size():
    """The sorting network has another shape for each size."""
    for k in [*range(4, 68), 127, 129, 255, 256]:
        G = gramian(k, 9)
        w = ops.weights(G, Krum(k // 2 - 1))
        assert torch.equal(w, ops.weights(G, Krum(k // 2 - 1), backend="reference")), k


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_go_to_the_lower_index(backend):
    J = torch.tensor([[9.0, 1.0], [1.0, 2.0], [4.0, 4.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    assert ops.weights(J @ J.mT, Krum(1), backend=backend).tolist() == [0, 1, 0, 0, 0]
    assert ops.weights(J @ J.mT, Krum(1, n_selected=2), backend=backend).tolist() == [0, 0.5, 0, 0.5, 0]
    pair = torch.tensor([[7.0, 0.0], [0.0, 1.0], [0.1, 0.7]], dtype=torch.float64)  # one neighbour each: two rows share the best distance
    assert ops.weights(pair @ pair.mT, Krum(0), backend=backend).tolist() == [0, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_few_present_give_their_mean(backend):
    mask = torch.tensor([[True] * 6, [True, False, True, True, True, False], [False, False, True, True, True, False]])
    G = gramian(6).expand(3, 6, 6)
    w = ops.weights(G, Krum(2), mask, backend=backend)
    assert w[0].max() == 1 and (w[0] != 0).sum() == 1
    torch.testing.assert_close(w[1], mask[1].double() / 4)
    torch.testing.assert_close(w[2], mask[2].double() / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_present_than_selected(backend):
    mask = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(ops.weights(gramian(5), Krum(0, n_selected=5), mask, backend=backend), mask.double() / 3)


def test_bad_hyperparameters():
    for make, message in (
        (lambda: Krum(-1), "n_byzantine is -1"),
        (lambda: Krum(1, n_selected=0), "n_selected is 0"),
        (lambda: Krum(1, distance="cosine"), "distance is 'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="n_byzantine is 2, which takes 5 gradients or more; there are 4"):
        ops.weights(gramian(4), Krum(2))
    with pytest.raises(ValueError, match="n_selected is 5, expected at most the number of gradients, 4"):
        ops.weights(gramian(4), Krum(1, n_selected=5))
