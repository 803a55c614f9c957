"""IMTLG, AlignedMTL and ConFIG beyond the laws of test_rules.py, and the eigenvalue routine they stand on in plain torch."""

import pytest
import torch
from problems import gramian, kinds
from rule_table import GOLDEN_J

from mmfast import ops
from mmfast.resolvers.alignment import IMTLG, LENGTHS, AlignedMTL, ConFIG
from mmfast.resolvers.linalg import eigh

BACKENDS = ["auto", "reference"]
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 16, 33, 64])
def test_jacobi_eigenvalues(k):
    for kind, G in kinds(k):
        values, V = (x[0] for x in eigh(G.unsqueeze(0)))
        torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-13, msg=kind)
        torch.testing.assert_close(V * values @ V.T, G, rtol=0, atol=1e-13 * G.trace().item(), msg=kind)
        torch.testing.assert_close(values.sort().values, torch.linalg.eigvalsh(G), rtol=0, atol=1e-13 * G.trace().item(), msg=kind)


def test_jacobi_leaves_decoupled_rows_in_place():
    G = torch.block_diag(gramian(3), torch.ones(1, 1), gramian(2)).double()
    values, V = (x[0] for x in eigh(G.unsqueeze(0)))
    assert values[3] == 1 and V[3, 3] == 1 and V[:, 3].count_nonzero() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_rows_are_orthogonal_and_of_equal_norm(scale, backend):
    """B, column by column through pref, turns the rows into B J with B G B = sigma P, P the projector on the kept subspace."""
    for k in (2, 3, 9):
        for kind, G in kinds(k):
            if kind == "norms over 10^6":  # no LAPACK routine of torch gives the small eigenvalues this needs
                continue
            B = torch.stack([ops.weights(G, AlignedMTL(scale, unit), backend=backend) for unit in torch.eye(k).tolist()], 1)
            values, V = torch.linalg.eigh(G)
            keep = values > 8 * k * EPS * values[-1]
            values, V = values[keep], V[:, keep]
            sigma = {"min": values[0], "median": values.median(), "rmse": values.mean()}[scale]
            torch.testing.assert_close(B, B.T, rtol=0, atol=1e-9 * B.abs().max().item(), msg=kind)
            torch.testing.assert_close(B @ G @ B / sigma, V @ V.T, rtol=0, atol=1e-8, msg=kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_aligned_of_copies(backend):
    """One direction is kept: the aligned rows all are 1 / sqrt(K) of it, so K copies of g give g / sqrt(K), at every scale of g."""
    for k in (2, 5, 64):
        w = ops.weights(torch.full((k, k), 7.0, dtype=torch.float64), AlignedMTL(), backend=backend)
        torch.testing.assert_close(w.sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [*LENGTHS, 0, 1])
def test_config_length(length, backend):
    for k in (1, 2, 7) if length != 1 else (2, 7):
        J = torch.randn(k, 30, dtype=torch.float64) * torch.logspace(-2, 3, k, dtype=torch.float64).unsqueeze(1)
        d = ops.weights(J @ J.T, ConFIG(length=length), backend=backend) @ J
        norm, cosines = J.norm(dim=1), J @ d / d.norm() / J.norm(dim=1)
        expected = {
            "projection": (J @ d).sum() / d.norm(),
            "min": norm.min() * cosines.sum(),
            "max": norm.max() * cosines.sum(),
            "harmonic": k / (1 / norm).sum() * cosines.sum(),
            "arithmetic": norm.mean() * cosines.sum(),
            "geometric": norm.log().mean().exp() * cosines.sum(),
            0: norm[0] * cosines.sum(),
            1: norm[-1 if k == 1 else 1] * cosines.sum(),
        }[length]
        torch.testing.assert_close(d.norm(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_config_preference_sets_the_cosines(backend):
    for k in (2, 5, 33):
        J, pref = torch.randn(k, 3 * k, dtype=torch.float64), torch.arange(1.0, k + 1, dtype=torch.float64)
        d = ops.weights(J @ J.T, ConFIG(pref.tolist()), backend=backend) @ J
        cosines = J @ d / (J.norm(dim=1) * d.norm())
        torch.testing.assert_close(cosines / cosines[0], pref, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [AlignedMTL, ConFIG])
def test_preference_follows_its_row(make, backend):
    """Leaving a row out leaves its preference out with it."""
    G, mask = gramian(4), torch.tensor([True, False, True, True])
    whole = ops.weights(G, make(pref=[1, 5, 2, 3]), mask, backend=backend)
    rest = [0, 2, 3]
    torch.testing.assert_close(whole[rest], ops.weights(G[rest][:, rest].contiguous(), make(pref=[1, 2, 3]), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_imtlg_keeps_its_sign_flip(backend):
    """Where the published weights sum to one only after a change of sign, the direction opposes every row; ConFIG's does not."""
    J = torch.tensor(
        [[-0.12, -0.92, -0.74, 0.17, 0.01], [0.67, -2.35, -6.64, -8.53, 0.6], [-1.17, -9.26, 25.28, 33.97, -14.9]], dtype=torch.float64
    )
    G = J @ J.T
    w = ops.weights(G, IMTLG(), backend=backend)
    expected = torch.linalg.solve(G, J.norm(dim=1))
    torch.testing.assert_close(w, expected / expected.sum(), rtol=1e-10, atol=0)
    assert (J @ (w @ J) < 0).all()
    assert (J @ (ops.weights(G, ConFIG(), backend=backend) @ J) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_common_direction_gives_zero(backend):
    """Two exactly opposite rows have no direction of equal cosines; two of different norms leave ConFIG none either."""
    for ratio in (1.0, 3.0, 1e6):
        row = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
        J = torch.stack([row, -ratio * row])
        for rule in (IMTLG(), ConFIG()):
            assert torch.equal(ops.weights(J @ J.T, rule, backend=backend), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_badly_scaled_rows(backend):
    """Norms over 24 orders of magnitude leave the direction's cosines equal."""
    C = gramian(5) / gramian(5).diagonal().sqrt() / gramian(5).diagonal().sqrt().unsqueeze(1)
    norm = torch.logspace(-12, 12, 5, dtype=torch.float64)
    for rule in (IMTLG(), ConFIG()):
        x = norm * ops.weights(C * norm * norm.unsqueeze(1), rule, backend=backend)
        cosines = C @ x
        torch.testing.assert_close(cosines, cosines.mean().expand(5), rtol=1e-9, atol=0)


def test_golden_directions():
    """The two-row example in terms of directions."""
    G = GOLDEN_J @ GOLDEN_J.T
    for rule, d in ((IMTLG(), (0.0767, 1, 1)), (AlignedMTL("rmse"), (0.5764, 2.6142, 2.6142)), (ConFIG(), (0.1588, 2.0706, 2.0706))):
        torch.testing.assert_close(ops.weights(G, rule) @ GOLDEN_J, torch.tensor(d, dtype=torch.float64), rtol=0, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="scale is 'mean', expected one of 'min', 'median', 'rmse'"):
        AlignedMTL("mean")
    with pytest.raises(ValueError, match="length is 'norm', expected one of 'projection'"):
        ConFIG(length="norm")
    with pytest.raises(ValueError, match="length is 2, expected the number of one of 2 gradients"):
        ops.weights(torch.eye(2), ConFIG(length=2))
    for pref in ([1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="pref is .* none negative"):
            ConFIG(pref)
        with pytest.raises(ValueError, match="pref is .* none negative"):
            AlignedMTL(pref=pref)


def test_repr():
    assert repr(IMTLG()) == "IMTLG()"
    assert repr(AlignedMTL("rmse", [1, 2])) == "AlignedMTL(scale='rmse', pref=(1.0, 2.0))"
    assert repr(ConFIG()) == "ConFIG(pref=None, length='projection')"
