# Each target alone does everything from a bare checkout: environment, installation, run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo quick test slow nightly rehearse lint clean

demo: $(VENV)/demo-installed
	$(BIN)/visual-memory demo

quick: $(VENV)/installed lint
	$(BIN)/pytest -n 2 --dist loadfile -m quick tests

test: $(VENV)/installed lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not nightly and not gpu" tests

slow: $(VENV)/installed
	$(BIN)/pytest -m "slow and not nightly and not gpu" tests

nightly: $(VENV)/installed
	$(BIN)/pytest -m "nightly and not gpu" tests

rehearse: $(VENV)/installed
	$(BIN)/python -m cluster.rehearse

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The extra demo is what `make demo` needs; dev, which holds it, is for everything else.
$(VENV)/demo-installed $(VENV)/installed: pyproject.toml
	@echo "Installing into $(VENV): about 5 GB, most of it PyTorch; a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[$(if $(findstring demo,$@),demo,dev)]"
	touch $@ $(if $(findstring demo,$@),,$(VENV)/demo-installed)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
