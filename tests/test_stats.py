"""Statistics of a Gramian against the same computed from the gradients."""

import pytest
import torch
from torch import nn

import mmfast as mf
from mmfast import stats


@pytest.fixture
def J():
    return torch.randn(4, 9, dtype=torch.float64) * torch.tensor([[1.0], [1e-3], [10.0], [1.0]])


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_against_the_gradients(J, scale):
    G = (J @ J.mT) * scale
    expected = torch.cosine_similarity(J.unsqueeze(0), J.unsqueeze(1), dim=-1)
    torch.testing.assert_close(stats.cosines(G), expected)
    torch.testing.assert_close(stats.norms(G), J.norm(dim=1) * scale**0.5)
    assert stats.conflict_rate(G) == (expected.triu(1) < 0).sum().item() / 6
    values = torch.linalg.svdvals(J)
    torch.testing.assert_close(stats.singular_values(G), values * scale**0.5, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.condition_number(G), values[0] / values[-1], rtol=1e-6, atol=0)
    d = J.norm(dim=1)
    similarity = 2 * d.unsqueeze(0) * d.unsqueeze(1) / (d.square().unsqueeze(0) + d.square().unsqueeze(1))
    torch.testing.assert_close(stats.magnitude_similarity(G), similarity)
    apart, together = J.unsqueeze(0) - J.unsqueeze(1), J.unsqueeze(0) + J.unsqueeze(1)
    bound = (1 - expected.square()) * apart.square().sum(-1) / together.square().sum(-1)
    torch.testing.assert_close(stats.curvature_bound(G), bound)
    w = torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(stats.cosine_to_direction(G, w), torch.cosine_similarity(J, (w @ J).unsqueeze(0), dim=-1))


ALL = [
    stats.norms,
    stats.cosines,
    stats.conflict_rate,
    stats.magnitude_similarity,
    stats.singular_values,
    stats.condition_number,
    stats.curvature_bound,
]


@pytest.mark.parametrize("function", ALL)
def test_batches_are_problems_of_their_own(function):
    J = torch.randn(2, 3, 4, 9)
    G = J @ J.mT
    together = function(G)
    assert together.dtype == torch.float64 and together.shape[:2] == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], function(G[i, j]), rtol=1e-9, atol=1e-12)


def test_missing_rows_count_nowhere(J):
    there = torch.tensor([True, False, True, True])
    G, small = torch.where(there.unsqueeze(-1), J, 0), J[there]
    G, small = G @ G.mT, small @ small.mT
    assert stats.conflict_rate(G) == stats.conflict_rate(small)
    torch.testing.assert_close(stats.condition_number(G), stats.condition_number(small), rtol=1e-6, atol=0)
    w = torch.tensor([1.0, 7.0, 3.0, 2.0])
    for ours, theirs in [
        (stats.cosine_to_direction(G, w), stats.cosine_to_direction(small, w[there])),
        (stats.cosines(G)[there][:, there], stats.cosines(small)),
        (stats.magnitude_similarity(G)[there][:, there], stats.magnitude_similarity(small)),
        (stats.curvature_bound(G)[there][:, there], stats.curvature_bound(small)),
    ]:
        torch.testing.assert_close(ours[there] if ours.dim() == 1 else ours, theirs)
    for matrix in (stats.cosines(G), stats.magnitude_similarity(G), stats.curvature_bound(G)):
        assert matrix[1].isnan().all() and matrix[:, 1].isnan().all() and matrix.isnan().sum() == 7
    assert stats.cosine_to_direction(G, w)[1].isnan() and stats.norms(G)[1] == 0


def test_limits():
    nothing = torch.zeros(3, 3)
    assert stats.conflict_rate(nothing).isnan() and stats.condition_number(nothing).isnan()
    assert stats.cosine_to_direction(nothing, torch.ones(3)).isnan().all()
    one = torch.tensor([[4.0]])
    assert stats.conflict_rate(one).isnan() and stats.condition_number(one) == 1 and stats.cosine_to_direction(one, torch.ones(1)) == 1
    copies = torch.full((3, 3), 0.3)
    assert stats.condition_number(copies).isinf() and stats.conflict_rate(copies) == 0 and (stats.curvature_bound(copies) == 0).all()
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert stats.conflict_rate(opposite) == 1 and stats.curvature_bound(opposite)[0, 1].isnan()
    assert stats.cosine_to_direction(opposite, torch.ones(2)).isnan().all()  # the direction is zero
    assert stats.cosine_to_direction(opposite, torch.tensor([2.0, 1.0])).tolist() == [1, -1]


@pytest.mark.parametrize("function", ALL)
def test_errors(function):
    with pytest.raises(ValueError, match=r"G has shape \(3, 4\), expected a Gramian"):
        function(torch.ones(3, 4))
    with pytest.raises(ValueError, match="G is a list"):
        function([[1.0]])
    with pytest.raises(ValueError, match=r"w has shape \(2,\), expected weights of shape \[..., 3\]"):
        stats.cosine_to_direction(torch.eye(3), torch.ones(2))


def test_conflict_of_what_is_no_number_is_not_known():
    G = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    assert stats.conflict_rate(G).isnan() and stats.conflict_rate(torch.eye(2)) == 0


def test_one_branch_has_no_pairs():
    block = mf.ImpartialityBlock([nn.Linear(3, 2)], mf.UPGrad())
    block(torch.randn(4, 3, requires_grad=True))[0].sum().backward()
    assert str(block.stats()).endswith("conflicting pairs: none to compare")
