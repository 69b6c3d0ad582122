# make quickstart: set up, train on real images, draw samples.  make test: set up, run every test.
# make wheelhouse: collect what a machine without network needs.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ARGS ?=
# Test files at a time.
JOBS ?= 2
# torch: its CUDA build where `nvidia-smi` finds a GPU, else the CPU build from this index. TORCH_INDEX= (empty)
# takes whatever pip is configured to find; TORCH_INDEX=URL asks another index first.
TORCH_INDEX ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
# Without a GPU, DeepSpeed would warn at each start that it found none.
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 || echo DS_ACCELERATOR=cpu)
TORCH := $(shell grep '^torch==' constraints.txt)

# Stops with one line unless PYTHON is new enough.
CHECK_PYTHON = @command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not found; name a Python: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }; \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
# Of the machine that `make wheelhouse` collects for. WITH="eval dali": more than the core. PIECE_MB=55: cut larger files.
PLATFORM ?= linux-x86_64
PYTHON_VERSION ?= 3.12
WITH ?=
PIECE_MB ?=
WHEELHOUSE ?= wheelhouse

.PHONY: setup quickstart test test-fast lint wheelhouse

setup: $(VENV)/ready

# torch-fidelity, which tests compare with, comes without its torchvision: the package index has that for CUDA, and beside
# a CPU torch it does not load.
$(VENV)/ready: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(VENV)/bin/pip install --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH))
	$(VENV)/bin/pip install -c constraints.txt -e '.[dev]'
	$(VENV)/bin/pip install -c constraints.txt --no-deps torch-fidelity
	@touch $@

# Threads that wait without spinning cost a few percent on an idle machine and save most of the time on a busy one.
# --quiet: the launcher says nothing unless something is wrong. --resume: a second `make quickstart` goes on where the first was stopped.
quickstart: setup
	OMP_WAIT_POLICY=passive $(ACCELERATOR) $(VENV)/bin/deepspeed --quiet fastdit/train.py --preset quickstart \
	  --ds_config zero1 --out $(RUN) --resume $(ARGS)

test: setup
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Three quarters of the tests, the quick ones: no launcher, no Triton interpreter, no benchmark.
test-fast: setup
	OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

# Collect what a machine with PyTorch and without network lacks (docs/offline.md). Neither .venv nor torch is needed.
wheelhouse:
	$(CHECK_PYTHON)
	@$(PYTHON) benchmarks/wheelhouse.py --platform '$(PLATFORM)' --python-version '$(PYTHON_VERSION)' --with '$(WITH)' \
	  --piece-mb '$(PIECE_MB)' --out '$(WHEELHOUSE)'

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
