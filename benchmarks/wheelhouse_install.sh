#!/usr/bin/env bash
# Install fastdit without network. Run in the checkout's root:   bash wheelhouse/install.sh && . wheelhouse/activate
#   PYTHON=python3             the Python to install into; it must have torch
#   TARGET=DIR                 put everything into DIR and leave that Python's own packages as they are
#   FASTDIT_CUDA_ARCHS="90"    compile the CUDA kernels for these GPUs, not for the one found here
# `activate` sets PYTHONPATH and PATH where TARGET, or a failed install, makes that necessary; else it is empty.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$PWD
python=${PYTHON:-python3}
site=${TARGET:-}
start=$SECONDS
fail() {
  echo "error: $*" >&2
  exit 2
}
pip() { "$python" -m pip "$@"; }
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

# Check the folder: it can be written, and every file that MANIFEST names is there and unchanged.
[ -w "$here" ] || fail "$here cannot be written; copy the folder to where you may write"
[ -f "$here/MANIFEST" ] || fail "$here/MANIFEST is missing; copy the whole folder again"
field() { sed -n "s/^# $1 //p" "$here/MANIFEST"; }
wheels=()
files=0
while read -r sum name; do
  [ "$sum" = "#" ] && continue
  [ -f "$here/$name" ] || fail "$here/$name is missing; copy it again from the machine that ran 'make wheelhouse'"
  [ "$(sha256sum <"$here/$name")" = "$sum  -" ] ||
    fail "$here/$name is damaged; copy it again from the machine that ran 'make wheelhouse'"
  files=$((files + 1))
  case $name in *.whl | *.whl.part00) wheels+=("${name%.part00}") ;; esac
done <"$here/MANIFEST"
[ "$files" = "$(field files)" ] || fail "$here/MANIFEST names $files files, not $(field files); copy it again"

# Check the machine.
[ -f pyproject.toml ] && [ -d fastdit ] && [ -d kernels ] ||
  fail "$root is no checkout of fastdit; run this in its root"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "$python does not run; name a Python that has torch: PYTHON=..."
[ "$version" = "$(field python)" ] ||
  fail "$python is Python $version, but these wheels are for $(field python); collect with PYTHON_VERSION=$version"
[ "$(uname -m)" = "$(field machine)" ] ||
  fail "this machine is $(uname -m), but these wheels are for $(field machine); collect with PLATFORM=linux-$(uname -m)"
has() { "$python" -c 'import sys, importlib.util as u; sys.exit(u.find_spec(sys.argv[1]) is None)' "$1"; }
has torch || fail "$python has no torch, which the wheelhouse leaves out; name a Python that has it: PYTHON=..."

# Install the wheels. Pieces of one are put together first.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$here/install.log
: >"$log"
for index in "${!wheels[@]}"; do
  name=${wheels[index]}
  [ -f "$here/$name" ] || cat "$here/$name".part* >"$scratch/$name"
  [ -f "$here/$name" ] && wheels[index]=$here/$name || wheels[index]=$scratch/$name
done
# The last line of the log that names an error, without pip's own summaries.
reason() {
  local line
  line=$(grep -E '([A-Z][a-z]+Error|[Ee]rror|ERROR): ' "$log" | grep -v 'error: [a-z-]*$' | tail -1) || true
  echo "${line:-no error is named}"
}
if [ "${#wheels[@]}" -gt 0 ]; then
  pip install -q --no-deps --no-compile ${site:+--upgrade --target "$site"} "${wheels[@]}" >>"$log" 2>&1 ||
    fail "the wheels were not installed ($(reason)); $log tells more; TARGET=DIR installs beside this Python's packages"
fi

# The commit, which records name. Where there is .git, it tells itself.
[ -e .git ] || cp "$here/commit" COMMIT

# Install the project. Its compiled kernels are built for the processor and the GPU found here. fastdit.kernels is the
# folder kernels/ by setuptools' package-dir alone: it exists once the project is installed, or linked.
link_project() {
  mkdir -p "$site"
  site=$(cd "$site" && pwd)
  "$python" setup.py -q build_ext --inplace egg_info >>"$log" 2>&1 || echo "the kernels were not compiled ($(reason))"
  ln -sfn ../kernels fastdit/kernels
  ln -sfn "$root/fastdit" "$site/fastdit"
  [ ! -d fastdit.egg-info ] || ln -sfn "$root/fastdit.egg-info" "$site/fastdit.egg-info"
}
if [ -n "$site" ]; then
  link_project
elif ! pip install -v --no-deps --no-build-isolation -e . >>"$log" 2>&1; then
  echo "the editable install failed ($(reason)); linked instead. $log tells more"
  site=$here/site
  link_project
fi
: >"$here/activate"
[ -z "$site" ] || cat >"$here/activate" <<EOF
export PYTHONPATH="$site\${PYTHONPATH:+:\$PYTHONPATH}" PATH="$site/bin:\$PATH"
EOF

# Say what there is now.
. "$here/activate"
cd /
has fastdit.kernels || fail "fastdit.kernels cannot be found after the install; $log tells more"
"$python" - "$root" <<'EOF'
import importlib.metadata as metadata, json, pathlib, re, sys, tomllib
root = pathlib.Path(sys.argv[1])
built = root / "fastdit" / "_native.json"
for name, report in (json.loads(built.read_text()) if built.exists() else {}).items():
    made_for = report.get("march") or "GPUs of compute capability " + ", ".join(report.get("archs", []))
    print(f"{name}: not built ({report['problem']})" if "problem" in report else f"{name}: built for {made_for}")
missing = []
for requirement in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]:
    name = re.match(r"[\w.-]+", requirement)[0]
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
if missing:
    print(f"not installed here: {', '.join(missing)}; docs/offline.md tells what runs without them")
EOF
echo "fastdit is installed for $("$python" -c 'import sys; print(sys.executable)') after $((SECONDS - start)) s," \
  "commit $(head -1 "$here/commit")"
[ -z "$site" ] || echo "now run:  . '$here/activate'"
