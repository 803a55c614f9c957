#!/usr/bin/env bash
# One visit to a machine with a GPU, nine minutes at most: builds for that GPU, verifies and tests every kernel, times them, looks for races.
#   benchmarks/gpu.sh --pack      puts what such a machine may lack into build/gpu-wheels: run it where there is a network, take the folder along
#   benchmarks/gpu.sh [FOLDER]    the visit; FOLDER (benchmarks/results/gpu) gets visit.log, gpu.csv and steps.tsv as it goes, and summary.md
# PYTHON is the Python that holds torch (python3), WHEELS the packed folder (build/gpu-wheels); BUILD=no takes the library that lies in mmfast/.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
wheels=${WHEELS:-build/gpu-wheels}

# Seconds of each step, and two more each to end: nine minutes in all.
declare -A limit=([packages]=20 [build]=130 [verify]=20 [tests]=75 [benchmark]=110 [triton]=90 [sanitizers]=65 [summary]=10)
grace=2
site=$PWD/build/gpu-site # for packages that cannot go where torch is

# such a machine has torch, NumPy and SciPy
packages=('setuptools>=77' ninja pytest iniconfig pluggy packaging pygments pytest-xdist execnet hypothesis sortedcontainers torchjd qpsolvers quadprog)
pytest=(-m pytest -q -p no:cacheprovider -p xdist -p benchmarks.gpu.failures -W default --dist worksteal)
cuda_tests=(tests/test_cuda.py tests/test_cuda_heads.py tests/test_cuda_build.py)
triton_tests=(tests/test_triton_gpu.py tests/triton_solve_interpreted.py
  -k 'not optimality and not hard and not hyper and not scales or (optimality and (UPGrad-3 or MGDA-5))')

pack() {
  local tag platforms=()
  for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
  done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    --dest "$wheels" "${packages[@]}" && du -sh "$wheels"
}

# step NAME COMMAND...: runs it within its limit; its output goes to visit.log, the end of it to the screen, what became of it to steps.tsv
step() {
  local name=$1 start=$SECONDS log=$out/visit.log before status
  shift
  echo "##### $name" | tee -a "$log"
  before=$(wc -c <"$log")
  timeout --kill-after="$grace" "${limit[$name]}" "$@" >>"$log" 2>&1
  status=$?
  tail -c +$((before + 1)) "$log" | tail -n 5
  printf '%s\t%d\t%d\t%d\n' "$name" "$status" $((SECONDS - start)) "${limit[$name]}" >>"$out/steps.tsv"
  [ "$status" = 0 ] || failed=1
}

visit() {
  local capability elsewhere=()
  failed=0
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -xm 1 '[0-9]*\.[0-9]') # 9.0 of an H100 or H200; other words where there is none
  if [ -z "$capability" ]; then
    echo "nvidia-smi names no GPU: there is nothing to visit"
    exit 3
  fi
  mkdir -p "$out" && rm -f "$out"/{visit.log,steps.tsv,gpu.csv,summary.md}
  export TORCH_CUDA_ARCH_LIST=$capability PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
  export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive # eight processes on sixteen cores; Triton's compile, each on one
  if [ -d "$wheels" ]; then
    if ! "$python" -c 'import os, sysconfig; raise SystemExit(not os.access(sysconfig.get_path("purelib"), os.W_OK))' >/dev/null; then
      elsewhere=(--target "$site")
      export PYTHONPATH="$PYTHONPATH:$site" PATH="$site/bin:$PATH"
    fi
    PIP_BREAK_SYSTEM_PACKAGES=1 step packages "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "${elsewhere[@]}" "${packages[@]}"
  fi
  if [ "${BUILD:-yes}" != no ]; then
    MMFAST_BUILD=cuda step build "$python" setup.py --quiet build_ext --inplace
  fi
  step verify "$python" -m mmfast doctor --check
  step tests "$python" "${pytest[@]}" -n 8 "${cuda_tests[@]}"
  step benchmark "$python" -m benchmarks.gpu "$out/gpu.csv" --seconds $((limit[benchmark] - 10))
  step triton "$python" "${pytest[@]}" -n 16 "${triton_tests[@]}"
  step sanitizers "$python" -m benchmarks.gpu.sanitize memcheck racecheck synccheck
  step summary "$python" -m benchmarks.gpu.summary "$out"
  cat "$out/summary.md"
  return "$failed"
}

case ${1:-} in
--pack) pack ;;
-*)
  sed -n '2,5s/^# *//p' "$0"
  [ "$1" = --help ]
  ;;
*)
  out=${1:-benchmarks/results/gpu}
  visit
  ;;
esac
