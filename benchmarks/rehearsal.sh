#!/usr/bin/env bash
# Rehearse, without a GPU, what happens on a GPU machine that has PyTorch, no network and little time (docs/offline.md):
#
#   bash benchmarks/rehearsal.sh FOLDER [install|suite]      both parts when none is named; FOLDER holds about 6 GB
#
#   PYTHON=python3.12   the Python of that machine       COLLECT=python3   the Python that runs `make wheelhouse`
#   UNTRACKED=1         copy new files as well that git does not track yet and does not ignore
#
# install: FOLDER/bare is an environment with what a PyTorch image has; it is kept for the next rehearsal. The tracked
# files are copied to FOLDER/checkout as they are now, without .git and with a new wheelhouse. Everything is installed
# there without network, and a few steps are trained.
# suite: the smallest run of gpu_suite.py in that environment, whole, then killed in each part and continued.
set -euo pipefail
fail() {
  echo "error: $*" >&2
  exit 2
}
[ $# -ge 1 ] || fail "usage: bash benchmarks/rehearsal.sh FOLDER [install|suite]"
case ${2:-all} in install | suite | all) ;; *) fail "$2 is no part of the rehearsal; choose install or suite" ;; esac
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
bare=$folder/bare environment=$folder/environment checkout=$folder/checkout
collect=${COLLECT:-python3}
say() { echo "=== $SECONDS s: $*"; }

# torch 2.11 with Triton 3.6, as on the machine that this stands for. That one has numpy 2.5. Where there is no GPU,
# Triton 3.6's interpreter runs the kernels' tests, and it needs numpy < 2.4.
VERSIONS=(torch==2.11.0 torchvision==0.26.0 triton==3.6.0 "numpy<2.4")

make_bare() {
  [ -f "$bare/ready" ] && return
  local python=${PYTHON:-python3.12} version
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>&1) && [ "$version" = 3.12 ] ||
    fail "$python is no Python 3.12; name one: PYTHON=/path/to/python3.12 bash benchmarks/rehearsal.sh $folder"
  say "making $bare (several GB; needs the network)"
  "$python" -m venv --clear "$bare"
  "$collect" "$source/benchmarks/wheelhouse.py" --list-image >"$folder/image.txt"
  "$bare/bin/python" -m pip install -q "${VERSIONS[@]}" -r "$folder/image.txt"
  touch "$bare/ready"
}

# Copy the files that git tracks, as the working tree has them, and collect the wheels.
copy_checkout() {
  rm -rf "$checkout"
  mkdir -p "$checkout"
  local list=(git -C "$source" ls-files -z) new
  [ -z "${UNTRACKED:-}" ] || list+=(--cached --others --exclude-standard)
  "${list[@]}" | while IFS= read -r -d '' name; do
    [ ! -f "$source/$name" ] || printf '%s\0' "$name"
  done | tar c -C "$source" --null -T - | tar x -C "$checkout"
  new=$(git -C "$source" ls-files --others --exclude-standard | tr '\n' ' ')
  [ -z "$new" ] || [ -n "${UNTRACKED:-}" ] || say "not copied, since git does not track them: $new"
  make -s -C "$source" wheelhouse PYTHON="$collect" WHEELHOUSE="$checkout/wheelhouse" WITH="${WITH:-}" \
    PYTHON_VERSION=3.12 PLATFORM="linux-$(uname -m)"
  say "copied: $(du -sh "$checkout" | cut -f1)"
}

# Run a command in the checkout as the machine without network would: with none of this machine's settings, and in a
# network namespace of its own where the system allows that. Proxies that nobody answers stop the rest.
offline() {
  local wall=()
  if unshare -rn ip link set lo up 2>/dev/null; then
    wall=(unshare -rn bash -c 'ip link set lo up; exec "$@"' offline)
  fi
  (
    cd "$checkout"
    env -i PATH="$environment/bin:$bare/bin:/usr/local/bin:/usr/bin:/bin" HOME="$folder/home" TMPDIR="$folder/tmp" \
      LANG=C.UTF-8 PIP_CONFIG_FILE=/dev/null PIP_NO_INDEX=1 HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive \
      OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" PYTHONUNBUFFERED=1 \
      http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 all_proxy=http://127.0.0.1:9 \
      FASTDIT_CUDA_ARCHS="$(command -v nvcc >/dev/null && echo 90)" "${wall[@]}" "$@"
  )
}

# A fresh environment that sees everything in `bare`, which itself stays as it is.
make_environment() {
  rm -rf "$environment" "$folder/home" "$folder/tmp"
  mkdir -p "$folder/home" "$folder/tmp"
  "$bare/bin/python" -m venv "$environment"
  local packages
  packages=$(echo "$bare"/lib/python3.*/site-packages)
  echo "import site; site.addsitedir('$packages')" >"$(echo "$environment"/lib/python3.*/site-packages)/bare.pth"
  offline python - <<'EOF' || fail "the rehearsal's environment is not bare, or it reaches a network"
import importlib.util, socket, sys
present = [name for name in ("deepspeed", "jsonargparse", "nvidia.dali", "diffusers") if importlib.util.find_spec(name)]
try:
    socket.create_connection(("192.0.2.1", 443), timeout=3)  # an address that is reserved for documentation
    reached = True
except OSError as error:
    reached = False
    print(f"no network: {error}")
sys.exit(bool(present) or reached)
EOF
}

# TARGET first: it leaves the environment as it is. Then the usual install, which the suite goes on with.
rehearse_install() {
  make_bare
  copy_checkout
  make_environment
  say "installing into a folder of its own"
  cp -r "$checkout" "$folder/checkout-target"
  (
    trap 'rm -rf "$folder/checkout-target"' EXIT
    checkout=$folder/checkout-target
    offline env TARGET=site bash wheelhouse/install.sh
    offline bash -c '. wheelhouse/activate; cd /; python -c "import fastdit.kernels, deepspeed as d; print(d.__file__)"'
  )
  say "installing into the environment"
  offline bash wheelhouse/install.sh
  offline python -c 'import fastdit.kernels, importlib.metadata as m; print("fastdit", m.version("fastdit"))'
  say "training"
  rm -rf "$folder/run"
  offline python fastdit/train.py --preset quickstart --device cpu --steps 3 --data.source synthetic:1x28x28:10:100 \
    --data.size 28 --batch 8 --out "$folder/run"
  grep '"commit"' "$folder/run/versions.json"
  say "the install is rehearsed"
}

# The suite's smallest setting whole, then killed in the middle of each kind of part and continued.
rehearse_suite() {
  [ -d "$checkout" ] || fail "$checkout is missing; rehearse the install first"
  local results=$folder/results
  rm -rf "$results"
  say "the small suite"
  offline python benchmarks/gpu_suite.py --tiny --budget 590 --out "$results/whole"
  [ "$(find "$results/whole" -type f | wc -l)" -le 8 ] || fail "the suite left more than 8 files in $results/whole"
  grep -q '"commit": "unknown"' "$results/whole"/*.json && fail "the record does not know its commit"
  say "kills"
  offline python benchmarks/rehearse_kills.py "$results/killed"
  say "the suite is rehearsed"
}

case ${2:-all} in install | all) rehearse_install ;; esac
case ${2:-all} in suite | all) rehearse_suite ;; esac
