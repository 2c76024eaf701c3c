#!/usr/bin/env bash
# Builds the CUDA kernels for the card of this machine, checks and times them, and runs the tests that need a GPU.
#
#     tools/gpu_check.sh                # results in $OUT, or in docs/results/<card>: summary.md, steps.log, check.*
#     tools/gpu_check.sh --rehearse     # without the CUDA parts, as on a machine without a GPU
#
# Needs no network: Python with torch (CUDA), triton, setuptools, ninja, pytest, transformers and hypothesis, and nvcc.
# Takes less than 9 minutes. Every step has a time limit, and a failed step does not stop the others. The exit status is
# 1 if any step failed.
#
# Variables: PYTHON (python3), OUT, and SECONDS_IN_ALL (530), which a rehearsal on a slow machine needs more of.

set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-530}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
START=$(date +%s)

rehearse=0
for argument in "$@"; do
  case $argument in
    --rehearse) rehearse=1 ;;
    *) echo "usage: tools/gpu_check.sh [--rehearse]" >&2; exit 2 ;;
  esac
done

# "90|NVIDIA H200" for a card, nothing without one.
card=$("$PYTHON" -c '
import torch
if torch.cuda.is_available():
    print("%d%d|%s" % (*torch.cuda.get_device_capability(), torch.cuda.get_device_name()))') || {
  echo "gpu_check: $PYTHON must have torch; set PYTHON to one that does" >&2
  exit 1
}
[ -n "$card" ] || rehearse=1
architecture=${card%%|*}
name=${card#*|}
if [ "$rehearse" = 1 ]; then
  name=rehearsal
  device=cpu
  export RCP_CUDA=0
  : "${OUT:=build/gpu_check/rehearsal}"
else
  device=cuda
  export RCP_CUDA=1 RCP_CUDA_ARCHS=$architecture
  : "${OUT:=docs/results/$(echo "$name" | tr 'A-Z ' 'a-z-' | tr -cd 'a-z0-9-')}"
fi
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
summary=$OUT/summary.md
log=$OUT/steps.log
failed=0
skipped=0

left() { echo $((SECONDS_IN_ALL - $(date +%s) + START)); }

say() { echo "$@" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds. Its output goes to the end of steps.log.
step() {
  local title=$1 limit=$2 begun result state
  shift 2
  [ "$limit" -ge 5 ] || limit=5
  begun=$(date +%s)
  echo "== $title, at most $limit s"
  echo "== $title" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  result=$?
  tail -n 4 "$log" | cut -c1-200
  case $result in
    0) state=passed ;;
    124 | 137) state="FAILED: stopped after $limit s" ;;
    *) state="FAILED: exit status $result" ;;
  esac
  [ $result = 0 ] || failed=1
  say "| $title | $state | $(($(date +%s) - begun)) s |"
  return $result
}

skip() {
  skipped=$((skipped + 1))
  say "| $1 | skipped: $2 | - |"
}

: >"$summary"
: >"$log"
if [ "$rehearse" = 1 ]; then
  say "**REHEARSAL: no GPU was used. The CUDA parts were skipped, and no number here is a GPU's.**"
else
  say "# $name, sm_$architecture"
fi
say ""
say "$("$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')," \
  "$(nvidia-smi --query-gpu=driver_version,clocks.max.sm --format=csv,noheader 2>/dev/null | head -n 1 | grep . || echo "no nvidia-smi")," \
  "$(nvcc --version 2>/dev/null | grep -o 'release [0-9.]*' || echo "no nvcc")"
say ""
say "| step | result | time |"
say "|---|---|---|"

# 1. Build. The tests' emulated device compiles beside it: one file on one core.
emulated_log=$(mktemp)
timeout $(($(left) * 45 / 100)) "$PYTHON" tests/emulated_device/emulated_device.py >"$emulated_log" 2>&1 &
emulated=$!
# Installing needs write access to the environment. Without it the libraries are built in place, and PYTHONPATH serves.
build() {
  "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable . -v ||
    "$PYTHON" setup.py build_ext --inplace
}
export -f build
export PYTHON
step build $(($(left) * 45 / 100)) bash -c build
wait $emulated
status=$?
{ echo "== emulated device"; cat "$emulated_log"; } >>"$log"
rm -f "$emulated_log"
if [ $status = 0 ]; then
  say "| emulated device | passed | beside it |"
else
  failed=1
  say "| emulated device | FAILED: exit status $status | beside it |"
fi

# 2. Compile the Triton kernels that the checks use, in parallel: one after the other they take minutes.
compile_triton() {
  local pids=() shard pid result=0
  for shard in 0 1 2 3 4 5 6 7; do
    "$PYTHON" -c "
from rcp_kernels.check import check_device
from rcp_kernels.check.run import all_cases
found = [case for case in all_cases() if case.op.startswith(('walsh', 'kv_cache')) or case.kind == 'rotation']
print(check_device('cuda', cases=found[$shard::8]).verdict)" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || result=1; done
  return $result
}
export -f compile_triton
[ "$rehearse" = 1 ] && skip triton "no GPU" || step triton 90 bash -c compile_triton

# 3. Check and time. The tests after it need 100 seconds, the sanitizers 60.
limit=$(($(left) - 160))
if "$PYTHON" -c 'import typer, rich' 2>/dev/null; then
  # The rest is for the checks, and for the case that is being timed when the budget ends.
  budget=$((limit * 6 / 10))
  [ "$rehearse" = 0 ] || budget=20
  step check "$limit" "$PYTHON" -m rcp_kernels check --device $device --bench --seconds "$budget" --out "$OUT"
else
  # Without typer and rich there is no command line, and so no timing.
  step check "$limit" "$PYTHON" -c "
import json, pathlib, sys
from rcp_kernels.check import check_device
report = check_device('$device')
out = pathlib.Path('$OUT')
(out / 'check.json').write_text(json.dumps(report.to_dict(), indent=2))
(out / 'check.md').write_text(report.to_markdown())
print(*(f'FAILED {o.op}, {o.case}: {o.note}' for o in report.failed), report.verdict, sep='\n')
sys.exit(bool(report.failed))"
  skip "check --bench" "typer or rich is not installed"
fi

# 4. Tests of the kernels on a GPU, and every test that takes a device.
mapfile -t files < <(grep -rlE 'def test_\w+\(([^)]*\W)?device\W' tests --include='test_*.py' | sort)
parallel=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 4 --dist worksteal); fi
tests=("$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}")
if [ "$rehearse" = 0 ]; then
  # The step before has run every case.
  step tests $(($(left) - 60)) "${tests[@]}" -k "(on_a_gpu or cuda) and not every_case_passes" \
    tests/cuda/test_on_a_gpu.py "${files[@]}"
else
  # The same tests on the emulated device would take minutes.
  step tests $(($(left) - 60)) "${tests[@]}" tests/cuda/test_on_a_gpu.py tests/emulated_device
fi

# 5. compute-sanitizer, three tools side by side, over some cases of the kernels in CUDA C++.
sanitize() {
  local pids=() tool pid result=0
  for tool in memcheck racecheck initcheck; do
    compute-sanitizer --tool $tool --error-exitcode 1 "$PYTHON" -c "
import sys
from rcp_kernels.check import check_device
from rcp_kernels.check.run import all_cases
ops = ('lut_linear', 'pack_weight', 'quantize_activation')
found = [case for case in all_cases() if case.op in ops and case.kind != 'rotation']
report = check_device('cuda', cases=found[::25])
print('$tool:', report.verdict, *(f'{o.case}: {o.note}' for o in report.failed), sep='\n')
sys.exit(bool(report.failed))" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || result=1; done
  return $result
}
export -f sanitize
if [ "$rehearse" = 1 ]; then
  skip sanitizers "no GPU"
elif ! command -v compute-sanitizer >/dev/null; then
  skip sanitizers "compute-sanitizer is not on the PATH"
else
  step sanitizers "$(left)" bash -c sanitize
fi

say ""
say "$([ $failed = 0 ] && echo "Every step that ran passed, $skipped skipped" || echo "**At least one step FAILED**") in $(($(date +%s) - START)) s." \
  "Results: $OUT"
exit $failed
