#!/usr/bin/env bash
# Builds in place with the Python that holds torch, checks every CUDA kernel on the GPU, times them; eight minutes at most.
#   benchmarks/gpu.sh [folder for the results]      PYTHON=python3 by default; WHEELS=folder of wheels to install from, without a network
# Results are written as they come, so what was cut off is there up to the cut: build.log, tests.log, triton.log, sanitizer.log, gpu.csv.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${1:-benchmarks/results/gpu}
if [ $# -gt 1 ] || [[ $out == -* ]]; then
  sed -n '2,4s/^# *//p' "$0"
  exit 2
fi
mkdir -p "$out"
if [ -n "${WHEELS:-}" ]; then
  for package in 'setuptools>=77' ninja numpy scipy pytest hypothesis quadprog torchjd; do
    "$python" -m pip install --quiet --no-index --find-links "$WHEELS" "$package" || echo "$package is not in $WHEELS: what needs it says so"
  done
fi

echo "== build"
if ! MMFAST_BUILD=cuda timeout 150 "$python" setup.py --quiet build_ext --inplace >"$out/build.log" 2>&1; then
  tail -20 "$out/build.log"
  echo "the build failed, see $out/build.log"
fi
# what can be run of it, and of the Triton kernels, which need no build
no_cuda=$("$python" -c 'from mmfast.backends import cuda; print(cuda.why_not() or "")')
no_triton=$("$python" -c 'from mmfast.backends import choice; print(choice.why_no_triton() or "")')
if [ -n "$no_cuda" ] && [ -n "$no_triton" ]; then
  echo "nothing can be run: $no_cuda; $no_triton"
  exit 3
fi

status=0
echo "== tests"
if [ -n "$no_cuda" ]; then
  echo "no CUDA operators: $no_cuda"
  status=1
fi
PYTHONPATH=tests timeout 100 "$python" -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning tests/test_cuda.py tests/test_cuda_heads.py tests/test_cuda_build.py 2>&1 |
  tee "$out/tests.log" | tail -15 || status=1
PYTHONPATH=tests timeout 60 "$python" -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning tests/test_triton_gpu.py tests/triton_solve_interpreted.py \
  -k "not optimality and not hard and not hyper and not scales or (optimality and (UPGrad-3 or MGDA-5))" 2>&1 |
  tee "$out/triton.log" | tail -15 || status=1
echo "== benchmark"
timeout 105 "$python" -m benchmarks.gpu "$out/gpu.csv" || status=1
echo "== compute-sanitizer"
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    # without torch's cache every tensor is an allocation of its own, and what is written behind it shows
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -q \
      -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning tests/test_cuda.py tests/test_cuda_heads.py \
      -k "unaligned or elementwise or (rules and (MGDA or UPGrad)) or (both_paths and 3-dtype2) or (operator_on_a_gpu and dtype2)" 2>&1 |
      tee -a "$out/sanitizer.log" | tail -3
    code=${PIPESTATUS[0]}
    if [ "$code" = 124 ]; then
      echo "$tool was cut off: what it had seen is in $out/sanitizer.log"
    elif [ "$code" != 0 ]; then
      status=1
    fi
  else
    echo "compute-sanitizer is not installed: $tool was not run" | tee -a "$out/sanitizer.log"
  fi
done
exit $status
