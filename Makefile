# Each target sets up what it needs; the second time that costs nothing.
PYTHON ?= python3
VENV := .venv
PEERS := .venv-bench
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs audit bench bench-shards bench-train bench-accuracy clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/medpsp demo runs/demo

# In two processes, whatever the machine has: tests start ranks, Ray and SLURM themselves.
test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Which branches no test takes: as `test`, in half as much time again; below 90 % is a failure.
.PHONY: coverage
coverage: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -q -n 2 --dist loadfile; status=$$?; \
	  $(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report && exit $$status

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ as a site in site/, which needs no network. A warning fails, but not with --quiet.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Known vulnerabilities of what is pinned; it asks a service on the network, so no test does this.
audit: $(READY)
	@$(BIN)/python -m tests.audit

# A quarter of an hour: whether the tests of pure modules notice each small change in them.
# MODULES="shards/order.py" tries that one alone.
.PHONY: mutants
mutants: $(READY)
	$(BIN)/python tests/mutants.py $(MODULES)

# One after the other, then docs/benchmarks.md from what all found: about 30 minutes on two quiet
# cores (shards 5, train 9, export 18), 50 with MEDPSP_DATA, the folder of real scans. What fails
# costs its own rows, and the exit code. Accuracy (hours) and GPU are as they were measured last.
bench: $(READY)
	mkdir -p runs/bench && rm -f $(addprefix runs/bench/,shards.json train.json export.json failed)
	@for part in bench-shards bench-train bench-export; do \
	  $(MAKE) $$part || echo $$part >> runs/bench/failed; done
	$(BIN)/python tests/bench/page.py
	@test ! -e runs/bench/failed || { echo "make bench: failed:" $$(cat runs/bench/failed); exit 1; }

# Some minutes; SECTIONS="convert headers" runs those alone, BENCH="--dir /scratch" keeps the data.
bench-shards: $(READY) $(PEERS)/shards/.ready
	$(BIN)/python tests/bench/shards.py $(SECTIONS) $(BENCH)

# Steps, pooling, augmentation, loader and ranks, against other networks and loops.
bench-train: $(READY) $(PEERS)/smp $(PEERS)/train
	@failed=; \
	for name in step train pooling augment feed ranks; do echo "== $$name"; \
	  $(BIN)/python tests/bench/$$name.py || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "bench-train: failed:$$failed"; exit 1; }

# Hours; goes on where it stopped. MEDPSP_DATA is the folder of real scans.
bench-accuracy: $(READY) $(PEERS)/smp
	$(BIN)/python tests/bench/accuracy.py run $(BENCH)
	$(BIN)/python tests/bench/accuracy.py table --test

# Half an hour, 50 minutes with real scans: `real` runs where MEDPSP_DATA is set, the folder of them.
# SECTIONS="latency real" runs those alone, BENCH="--dir /scratch" keeps the networks.
.PHONY: bench-export
bench-export: $(READY) $(PEERS)/export
	$(BIN)/python tests/bench/export.py $(SECTIONS) $(BENCH)

# Beside our torch and timm, so that both run in one process.
$(PEERS)/smp: | $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@ segmentation_models_pytorch==0.6.0

$(PEERS)/train: | $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@ \
	  lightning-fabric==2.6.6 lightning-utilities==0.15.3 pytorch-lightning==2.6.6 \
	  torchmetrics==1.9.0 accelerate==1.15.0 monai==1.6.1 pytorch-ignite==0.5.5

$(PEERS)/export: | $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@ \
	  openvino==2026.4.1 openvino-telemetry==2025.2.0 nncf==3.4.0 networkx==3.6.1 ninja==1.13.2 \
	  pydot==4.0.1 pyparsing==3.3.3 scikit-learn==1.9.1 joblib==1.6.0 threadpoolctl==3.8.0 \
	  tabulate==0.10.0 safetensors==0.8.0 narwhals==2.29.0 monai==1.6.1

# One by one: a peer that cannot be installed costs its own rows only.
$(PEERS)/shards/.ready: tests/bench/peers.txt | $(READY)
	rm -rf $(PEERS)/shards && $(PYTHON) -m venv $(PEERS)/shards
	@grep -v '^#' $< | while read -r peer; do \
	  $(BIN)/uv pip install --quiet --python $(PEERS)/shards/bin/python --constraint $< "$$peer" \
	  || $(PEERS)/shards/bin/python -m pip install --quiet --constraint $< "$$peer" \
	  || echo "$$peer: not installed, its rows will say so"; done
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs dist site

# Both installers refuse a file whose SHA-256 is not in .ci/hashes.txt. Nothing is built in an
# isolated environment, which would hold the newest of everything: what builds comes first.
HASHES := .ci/hashes.txt
HASHED := --quiet --require-hashes --no-build-isolation --requirement
BUILDERS := hatchling|packaging|pathspec|pluggy|setuptools|tomlkit|trove-classifiers|uv

# uv installs in a tenth of pip's time, but reads no pip.conf: behind a mirror, pip takes over.
$(READY): pyproject.toml $(HASHES)
	@$(PYTHON) -c 'import sys; sys.exit("medpsp needs Python 3.11 or newer; make PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
	  echo "no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	awk '/^[a-z]/ {wanted = /^($(BUILDERS))==/} wanted' $(HASHES) >$(VENV)/builders.txt
	$(BIN)/python -m pip install $(HASHED) $(VENV)/builders.txt
	$(BIN)/uv pip install --python $(BIN)/python $(HASHED) $(HASHES) \
	  || $(BIN)/python -m pip install $(HASHED) $(HASHES)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
