# Every target sets up its own environment first; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers

.PHONY: study test soak lint types bench dashboard pictures setup constraints clean

study: $(STAMP)  ## the main job on synthetic heads: a small stability study on this machine
	$(BIN)/python studies/stability_sweep.py

test: $(STAMP)  ## tests but those marked long, over three processes: some mostly wait, and what they start shares the cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder

soak: $(STAMP)  ## what is too long for every change: tests marked long, `ray up` among them, 50 kills of an ingest, 30 of a study
	EQUIPOISE_LONG=1 $(BIN)/python -m pytest --timeout 1800 -m long
	EQUIPOISE_KILLS=50 $(BIN)/python -m pytest --timeout 1800 tests/slicestore/test_kill.py
	EQUIPOISE_CHAOS=30 $(BIN)/python -m pytest -s tests/equipoise/launch/test_chaos.py

lint: $(STAMP)  ## style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

types: $(STAMP)  ## strict types
	$(BIN)/mypy

bench: $(PEERS)  ## benchmarks, as ratios within one run; ONLY=step runs one family
	$(BIN)/python tests/benchmarks $(if $(ONLY),--only $(ONLY))

dashboard: $(STAMP)  ## the latest study in the browser, on this machine only
	$(BIN)/equipoise dashboard

pictures: $(STAMP)  ## the pictures of README.md, of the latest study on synthetic heads; needs a Chromium
	$(BIN)/python docs/pictures.py

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,peers]" -c constraints.txt
	touch $@

constraints: $(PEERS)  ## pin what is installed now
	( echo "# Exact versions of everything an installation holds. Renewed by: make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\).*/\1/' ) > constraints.txt

clean:
	rm -rf $(VENV) build dist
