"""What pytest-benchmark stores beside a number: enough to judge it, no host name."""

from benchmarks.machine import environment


def pytest_benchmark_generate_machine_info(config):
    env = environment()
    return {name: env[name] for name in ("machine", "cpu", "python", "torch")}


def pytest_benchmark_generate_commit_info(config):
    env = environment()
    return {"id": env["commit"], "time": env["date"]}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for benchmark in output_json["benchmarks"]:  # the summary is what is compared; thousands of samples stay out of the repository
        benchmark["stats"].pop("data", None)
