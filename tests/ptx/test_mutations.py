"""The kernels without one of the instructions by which their threads wait for each other: something notices, or the other tests show nothing.

What is seen of a mutation: "race" in shared memory, "failure" (a part of a warp, half of a cluster's barrier), "deadlock", "bits" that are not the CPU's.
"""

import pytest
import torch
from test_cuda import gradients

import mmfast as mf
from mmfast import ops
from ptx import device
from ptx.cases import cancelling


def seen(path, sites, monkeypatch):
    """Of two calls without those instructions: one is measured, for its sum cancels."""
    monkeypatch.setenv("MMFAST_CUDA_PATH", path)
    per, shape = ("sample", (2, 4500)) if path == "per_sample" else ("batch", (1, 9000))
    found = set()
    with device.without(*sites):
        for grads in (gradients(4, shape, torch.float32), cancelling(4, shape, torch.float32)):
            how = {"per": per, "preserve_norm": True, "backend": "cpu"}
            expected = ops.resolve_info(grads, mf.PCD(), **how)
            try:
                with device.serving():
                    results = ops.resolve_info(grads, mf.PCD(), **how)
            except RuntimeError as error:
                found.add("deadlock" if "deadlock" in str(error) else "failure")
            else:
                if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
                    found.add("bits")
    if device.races():
        found.add("race")
    device.reset()
    return found


@pytest.mark.parametrize("path", ["two_pass", "persistent", "cluster", "per_sample"])
def test_nothing_is_seen_of_the_kernels_as_they_are(path, monkeypatch):
    assert seen(path, [], monkeypatch) == set()


@pytest.mark.parametrize("path", ["persistent", "cluster", "per_sample"])
def test_a_weakened_wait_for_copies(path, monkeypatch):
    """Each cp.async.wait_group, for one group less."""
    sites = device.sites("cp.async.wait_group", "read_phaseIfLi4E")
    assert len(sites) == 4
    for site in sites:
        assert "race" in seen(path, [site], monkeypatch), device.site_name(site)


@pytest.mark.parametrize("kinds", [("arrive", "wait"), ("arrive",), ("wait",)], ids="+".join)
@pytest.mark.parametrize("function", ["persistent_kernel", "norm_phase"])
def test_a_cluster_without_its_barrier(function, kinds, monkeypatch):
    """Both halves, or one."""
    sites = [site for kind in kinds for site in device.sites(f"barrier.cluster.{kind}", function)]
    assert sites and seen("cluster", sites, monkeypatch)


@pytest.mark.parametrize(
    (
        "path",
        "function",
        "needed",
    ),  # how many of its barriers this problem cannot do without: others are for several chunks, slots or samples
    [
        ("two_pass", "gram_kernelIfLi4E", 3),
        ("two_pass", "lengths_kernelIfE", 1),
        ("two_pass", "combine_kernelIfE", 2),
        ("two_pass", "combine_measuredIfE", 1),
        ("persistent", "persistent_kernel", 1),
        ("persistent", "read_phaseIfLi4E", 3),
        ("persistent", "solve_phase", 3),
        ("persistent", "norm_phase", 1),
        ("persistent", "measure_phaseIfE", 1),
        ("persistent", "write_phaseIfE", 1),
        ("cluster", "solve_phase", 3),
        ("per_sample", "norm_phase", 1),
    ],
)
def test_a_block_without_one_of_its_barriers(path, function, needed, monkeypatch):
    sites = device.sites("bar.sync", function)
    assert sum("race" in seen(path, [site], monkeypatch) for site in sites) >= needed


@pytest.mark.parametrize(
    ("path", "function"), [("two_pass", "gram_kernelIfLi4E"), ("persistent", "read_phaseIfLi4E"), ("two_pass", "RuleILi10E")]
)
def test_a_shuffle_with_a_part_of_its_mask(path, function, monkeypatch):
    sites = device.sites("shfl.sync", function)
    assert "failure" in seen(path, sites, monkeypatch)


def test_a_warp_that_does_not_wait_for_itself(monkeypatch):
    """The solver of the persistent kernel, which works in shared memory."""
    sites = [site for function in ("RuleILi10E", "run_chain") for site in device.sites("bar.warp.sync", function)]
    assert "race" in seen("persistent", sites, monkeypatch)
