# Everything here sets itself up: a Linux machine with make and Python 3.11 to 3.13 is enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# PyTorch's CPU wheels are not on PyPI. A folder with one (PIP_FIND_LINKS) does as well; hashes decide what is accepted.
TORCH_PAGE := $(if $(PIP_FIND_LINKS),,--find-links=https://download.pytorch.org/whl/cpu/torch/)
FIGURES := launch_overhead first_all_reduce train_recovery rank_memory warm_throughput container_speed image roll_call \
  gang_throughput train_speed train_operability
# Tests run side by side: half of what they do is waiting. On engines each worker has nodes of its own.
WORKERS ?= 2
MINUTES ?= 20
HARDWARE_KINDS := $(filter-out shell,$(basename $(notdir $(wildcard hardware/*.yaml))))

.PHONY: demo test test-quick install smoke token pin-base audit soak lint unit native gpu compat cluster figures bad-days lock clean

demo: .venv/.ready            ## two nodes train on this machine
	@$(BIN)/python -m demo

test: lint unit native gpu cluster  ## everything; `CLUSTER_TESTS=skip make test` leaves out what needs a Docker engine and root

test-quick: lint unit           ## lint, unit tests, and one job of two nodes on real engines; four minutes
	$(BIN)/python -m pytest tests/cluster/test_two_nodes.py tests/cluster/test_smoke_gloo.py

install:                      ## `torchrun-compose`, the command for all nodes over ssh, for this user
	pipx install . || uv tool install .

smoke: .venv/.ready           ## the image built, and two nodes trained, on this user's own engine; no root
	$(BIN)/python -m pytest tests/smoke

soak: .venv/.ready            ## random faults on four nodes, with the culprit and the losses checked: make soak MINUTES=60
	SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s tests/cluster/soak.py

token:                        ## secrets/cluster_token, once; copy it to all nodes and set CLUSTER_TOKEN_FILE to it
	@set -C; umask 277; head -c 32 /dev/urandom | base64 > secrets/cluster_token
	@[ "$$(id -u)" != 0 ] || chown 1000:1000 secrets/cluster_token
	@echo "secrets/cluster_token was made, for user $$(stat -c %u secrets/cluster_token) alone, who must be RUN_AS (1000:1000)."
	@echo "Copy it to all nodes and set CLUSTER_TOKEN_FILE=./secrets/cluster_token in .env."

pin-base:                     ## the base image of Dockerfile by the digest that its tag has today; asks the registry
	@tag=$$(sed -n 's/^ARG BASE_IMAGE=\([^@]*\).*/\1/p' Dockerfile | head -1); \
	digest=$$(docker buildx imagetools inspect "$$tag" --format '{{.Manifest.Digest}}') && \
	sed -i "0,/^ARG BASE_IMAGE=.*/s||ARG BASE_IMAGE=$$tag@$$digest|" Dockerfile && echo "BASE_IMAGE=$$tag@$$digest"

audit: .venv/.ready           ## known vulnerabilities of what the images hold; needs PyPI's advisories
	for lock in cpu cuda; do $(BIN)/uv tool run pip-audit==2.9.0 --disable-pip --require-hashes -r requirements/$$lock.txt || exit 1; done

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	for kind in $(HARDWARE_KINDS); do HARDWARE=$$kind $(BIN)/compose-lint compose.yaml || exit 1; done

unit native cluster: .venv/.ready
	$(BIN)/python -m pytest tests/$@ -n $(WORKERS) --dist loadfile

# TEST_PYTHON: one that has a torch for this GPU, pytest, pytest-timeout and psutil; the project's own torch is for CPUs.
TEST_PYTHON ?= $(BIN)/python
gpu: .venv/.ready             ## on an NVIDIA GPU, no Docker: two nodes on one card, every hang and fault; TEST_PYTHON has torch
	$(TEST_PYTHON) -m pytest tests/gpu

# PyPI's builds of torch run on CPUs too; their CUDA libraries come along, 3 GB to fetch and 7 GB on the disk.
TORCH ?= 2.8.0
COMPAT := .cache/compat-$(TORCH)
COMPAT_TESTS ?= tests/native
compat: .venv/.ready          ## the native tests with another torch: make compat TORCH=2.8.0
	@test -x $(COMPAT)/bin/pytest || { $(PYTHON) -m venv $(COMPAT) && $(COMPAT)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir \
	  torch==$(TORCH) numpy pillow psutil python-dotenv setproctitle tensorboard pytest pytest-timeout pytest-xdist hypothesis; }
	$(COMPAT)/bin/python -m pytest $(COMPAT_TESTS) -n $(WORKERS) --dist loadfile

figures: .venv/.ready         ## the figures of docs/figures.md, measured on this machine
	for figure in $(FIGURES); do echo "== $$figure"; $(BIN)/python -m benchmarks.$$figure || exit 1; done

bad-days: .venv/.ready       ## the table of docs/troubleshooting.md: plain torchrun and ours on every bad day; 25 minutes
	BAD_DAY_TABLE=docs/troubleshooting.md $(BIN)/python -m pytest tests/cluster/test_bad_day*.py tests/cluster/test_hangs.py \
	  tests/cluster/test_doctor.py tests/cluster/test_faults_start.py tests/cluster/test_report_stacks.py tests/cluster/test_hostname.py

lock: .venv/.ready            ## pin every dependency anew
	$(BIN)/python requirements/lock.py

.venv/.ready: requirements/dev.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "Setting up .venv with $$($(PYTHON) --version): PyTorch for CPUs and the tools, 1 GB; some minutes the first time."
	@$(PYTHON) -m venv .venv
	@quiet=--quiet; [ ! -t 1 ] || quiet=; \
	$(BIN)/pip install $$quiet --disable-pip-version-check --require-hashes $(TORCH_PAGE) -r requirements/dev.txt
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
