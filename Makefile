# Two commands for users: `make run` and `make test`. Each makes the virtual environment when it is missing.
# Without a GPU:  make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV   ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
LIBRARY := actors clusters comms learning policies runtime
# Some images set it: then each process of a run, and there are many, compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install run test soak check lint types format clean

help: ## print this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) -e .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(PIP) -e '.[dev]'
	touch $@

install: $(BIN)/.installed ## make the virtual environment and install

run: $(BIN)/.installed ## train on the bundled digits over eight unequal devices, on a local Ray
	$(BIN)/fedbonsai run examples/digits.yaml

test: $(BIN)/.installed-dev ## run the tests, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak"

soak: $(BIN)/.installed-dev ## more kills on Ray, many examples of each property, a million mutated packets: an hour on two cores
	$(BIN)/python -m pytest -m soak
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2 -m "not ray"
	$(BIN)/python benchmarks/soak_packets.py
	$(BIN)/python benchmarks/soak_chaos.py

lint: $(BIN)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The root is the package, whatever the checkout is called: type-check it through a link of the right name.
types: $(BIN)/.installed-dev
	mkdir -p .typecheck && ln -sfn .. .typecheck/fedbonsai
	cd .typecheck && ../$(BIN)/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		$(foreach folder,$(LIBRARY),-p fedbonsai.$(folder))

check: lint types test ## what CI runs: ruff, mypy, tests

format: $(BIN)/.installed-dev ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .typecheck .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
