"""The path of a CUDA resolve as a pure function of sizes."""

import pytest

host = pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)

H200 = {"processors": 132, "shared_block": 232448, "shared_processor": 233472, "cooperative": True, "cluster": 0}
FIXED = 12000
CHUNK = 4096


def plan(k, n, size=4, one_problem=True, fixed=FIXED, **limits):
    return host.gpu_plan(k, n, size, fixed, one_problem, **{**H200, **limits})


def test_small_data_are_read_once():
    p = plan(4, 131072)
    assert p["path"] == "persistent" and p["launches"] == 1 and p["blocks"] == 32
    assert p["read"] == 4 * 131072 * 4 and p["written"] == 131072 * 4
    assert p["staged_steps"] == 32 and p["shared"] == FIXED + 32 * 4 * 128 * 4


@pytest.mark.parametrize(
    ("n", "blocks"), [(1, 1), (CHUNK, 1), (CHUNK + 1, 2), (132 * CHUNK, 132), (132 * CHUNK + 1, 133), (528 * CHUNK + 1, 265)]
)
def test_a_block_for_each_slot_while_there_is_room(n, blocks):
    assert plan(2, n)["blocks"] == blocks


def test_more_slots_than_room_are_shared_out():
    """Two processors have room for eight blocks."""
    p = plan(2, 20 * CHUNK, processors=2)
    assert p["blocks"] == 8 and p["staged_steps"] <= 3 * 32


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_bounds_hold_for_any_length(k, size):
    for n in [1, 100, CHUNK, 5 * CHUNK + 7, 10**6, 2 * 10**6 + 1, 10**7, 10**8, 2**31 + 5, 2**40]:
        p, floor = plan(k, n, size), k * n * size
        assert p["written"] == n * size and floor <= p["read"] <= 2 * floor
        if p["path"] == "persistent":
            per_processor = -(-p["blocks"] // 132)
            assert (
                p["shared"] <= H200["shared_block"]
                and per_processor * (p["shared"] + 1024) <= H200["shared_processor"]
                and per_processor <= 4
            )
            assert p["staged_steps"] % 4 == 0 and 4 * (2 * floor - p["read"]) >= floor
        else:
            assert p["read"] == 2 * floor and p["launches"] > 1


def test_what_the_persistent_path_does_not_do():
    for arguments in [
        {"k": 9, "n": 1000},
        {"k": 5, "n": 1000, "size": 8},
        {"k": 3, "n": 0},
        {"k": 3, "n": 1000, "one_problem": False},
        {"k": 3, "n": 1000, "cooperative": False},
        {"k": 3, "n": 1000, "fixed": 240000},
        {"k": 4, "n": 10**9},
    ]:
        assert plan(**arguments)["path"] == "two_pass", arguments


@pytest.mark.parametrize(
    ("k", "n", "blocks", "slots_each"),
    [(3, 1, 1, 1), (3, CHUNK, 1, 1), (3, CHUNK + 1, 2, 1), (3, 5 * CHUNK, 8, 1), (3, 16 * CHUNK, 16, 1), (3, 17 * CHUNK, 16, 2)],
)
def test_small_data_take_one_cluster(k, n, blocks, slots_each):
    p = plan(k, n, cluster=16)
    assert (p["path"], p["blocks"], p["launches"], p["workspace"]) == ("cluster", blocks, 1, 0)
    assert (p["read"], p["written"]) == (k * n * 4, n * 4)
    assert p["staged_steps"] == slots_each * 32 and p["shared"] == FIXED + slots_each * (32 * k * 128 * 4 + k * (k + 1) // 2 * 8)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("cluster", [0, 1, 8, 16])
def test_a_cluster_keeps_all_of_at_most_a_megabyte(cluster, size):
    for k in range(1, 9 if size < 8 else 5):
        for n in (1, 1000, CHUNK, 10 * CHUNK + 1, 2**20 // (k * size), 2**20 // (k * size) + 1, 10**6):
            p = plan(k, n, size, cluster=cluster)
            if p["path"] != "cluster":
                assert p == plan(k, n, size)
                continue
            assert cluster and k * n * size <= 2**20 and p["blocks"] <= cluster and p["blocks"] & (p["blocks"] - 1) == 0
            assert p["shared"] <= H200["shared_block"] and p["staged_steps"] * 128 * p["blocks"] >= n and p["read"] == k * n * size
    assert (plan(8, 100, size if size < 8 else 4, cluster=cluster)["path"] == "cluster") == bool(cluster)
    assert plan(3, 1000, size, one_problem=False, cluster=cluster)["path"] == "two_pass"
    assert plan(3, 1000, size, fixed=240000, cluster=cluster)["path"] == "two_pass"
    assert plan(3, 1000, size, cooperative=False, cluster=cluster)["path"] == ("cluster" if cluster else "two_pass")


def test_limits_that_a_device_was_tuned_to_or_is_not_allowed():
    n = 2**20 // (4 * 4)
    assert plan(4, n, cluster=16, cluster_bytes=2**20 - 1)["path"] == "persistent"
    assert plan(4, 2 * n, cluster=16)["path"] == "persistent" and plan(4, 2 * n, cluster=16, cluster_bytes=2**21)["path"] == "cluster"
    little = next(n for n in range(10**6, 10**8, 10**6) if plan(4, n)["path"] == "two_pass")
    assert plan(4, little, share_kept=0.1)["path"] == "persistent" and plan(4, little - 10**6, share_kept=0.5)["path"] == "two_pass"
    assert samples(2, 100, CHUNK, per_sample=False)["path"] == "two_pass"


def test_scratch_of_the_solvers_is_bounded():
    """13 K^2 doubles and some to a problem: 64 MB at most in all, a thousand warps, one to a processor at K = 64."""
    for k in (2, 8, 64, 128, 256):
        scratch = 13 * k * k + 75 * k + 100
        for batch in (0, 1, 100, 10**6):
            warps = host.gpu_solver_warps(batch, scratch)
            assert min(batch, 1) <= warps <= min(batch, 1024) and warps * scratch * 8 <= 64 * 2**20
        assert warps >= (132 if k <= 64 else 9)
    assert host.gpu_solver_warps(3, 10**9) == 1


def samples(k, batch, inner, size=4, fixed=FIXED, **limits):
    return host.gpu_plan_samples(k, batch, inner, size, fixed, **{**H200, **limits})


def test_a_block_for_each_sample():
    p = samples(2, 100, CHUNK)
    assert (p["path"], p["blocks"], p["launches"], p["workspace"]) == ("per_sample", 100, 1, 100 * 3)
    assert p["read"] == 2 * 100 * CHUNK * 4 and p["written"] == 100 * CHUNK * 4
    assert samples(2, 10**6, CHUNK)["blocks"] == 4 * 132  # 32 kB and what is fixed, four to a processor
    assert samples(8, 132, CHUNK)["blocks"] == 132  # 128 kB
    assert samples(8, 133, CHUNK)["path"] == "two_pass"  # more problems than such blocks, of which a warp each solves at once


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8])
def test_bounds_hold_for_samples(k, size):
    for batch in (1, 50, 10**5):
        for inner in (1, 2047, 2048, CHUNK + 1, 10**5, 10**7):
            p, floor = samples(k, batch, inner, size), k * batch * inner * size
            assert p["written"] == batch * inner * size and floor <= p["read"] <= 2 * floor
            if p["path"] == "per_sample":
                assert p["shared"] <= H200["shared_block"] and p["staged_steps"] % 4 == 0 and p["blocks"] <= batch
                assert 4 * (2 * floor - p["read"]) >= floor


def test_samples_that_no_block_can_keep():
    for arguments in [(9, 10, 5000), (3, 0, 5000), (3, 10, 0), (3, 10, 2047), (5, 10, 5000, 8), (4, 10, 10**7)]:
        assert samples(*arguments)["path"] == "two_pass", arguments
    assert samples(3, 10, 5000, shared_block=0, shared_processor=0)["path"] == "two_pass"


def test_nearly_all_is_kept_up_to_the_shared_memory_of_the_chip():
    """29 MB in whole slots of 64 to 128 KB: two thirds at least; what is read again is what the L2 cache read last."""
    for k in (2, 3, 4, 5, 8):
        n = 29 * 10**6 // (4 * k)
        assert plan(k, n)["read"] < 1.4 * 4 * k * n, k
