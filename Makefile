# `make demo` and `make test` are all a newcomer needs; the rest is for those who change the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
QUIET := $(shell test -t 2 || echo --quiet)

.PHONY: demo test test-lm-eval test-optimum check check-report docs bundle wheel clean

demo: $(VENV)/.demo-installed
	$(BIN)/python -m gpt2_edge.benchmarks.demo models/storyteller demo

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -n auto

# Tests of what lets lm-evaluation-harness use a model, with the real harness (`make test` takes a stand-in for it).
test-lm-eval: $(VENV)/.dev-installed
	$(BIN)/python -m pip install $(QUIET) --editable '.[dev,lm-eval]' --config-settings editable_mode=strict
	$(BIN)/python -m pytest tests/test_lm_eval.py tests/installed_lm_eval.py

# Tests of what optimum exports and of what is exported for it, with the real optimum.
test-optimum: $(VENV)/.dev-installed
	$(BIN)/python -m pip install $(QUIET) --editable '.[dev,optimum]' --config-settings editable_mode=strict
	$(BIN)/python -m pytest tests/test_standard.py tests/installed_optimum.py

check: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Opens the HTML report of `gpt2-edge bench` in headless Chromium, which has to be installed.
check-report: $(VENV)/.dev-installed
	mkdir -p build/report
	$(BIN)/gpt2-edge bench --quick --format html --output build/report/report.html
	$(BIN)/python tests/check_report.py build/report/report.html build/report

# The site of docs/, in build/site. A dead link or a page that the menu lacks is an error.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The model folder that the wheel carries, made anew from the checkpoint.
bundle: $(VENV)/.demo-installed
	rm -rf build/bundle runtime/bundled/storyteller
	$(BIN)/gpt2-edge export models/storyteller -o build/bundle/storyteller-fp32
	$(BIN)/gpt2-edge quantize build/bundle/storyteller-fp32 -o runtime/bundled/storyteller --precision int8 \
		--calibration models/storyteller/calibration.txt --text models/storyteller/held_out.txt

wheel: $(VENV)/.dev-installed
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) build dist demo *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: run make PYTHON=python3.12 demo, say" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first: what needs it is then content with the CPU build.
$(VENV)/.torch-installed: $(BIN)/python export/install_torch.py
	$(BIN)/python export/install_torch.py $(TORCH_VERSION) $(QUIET)
	touch $@

$(VENV)/.demo-installed: $(VENV)/.torch-installed pyproject.toml
	$(BIN)/python -m pip install $(QUIET) --editable '.[cpu,export,quantize,bench]'
	touch $@

# A strict editable install is one that type checkers can read; it has to be renewed when a file is added.
$(VENV)/.dev-installed: $(VENV)/.torch-installed pyproject.toml $(wildcard runtime/*.py runtime/*/*.py export/*.py quantize/*.py benchmarks/*.py runtime/bundled/*/*)
	$(BIN)/python -m pip install $(QUIET) --editable '.[dev]' --config-settings editable_mode=strict
	touch $@ $(VENV)/.demo-installed

$(VENV)/.docs-installed: $(VENV)/.dev-installed
	$(BIN)/python -m pip install $(QUIET) --editable '.[dev,docs]' --config-settings editable_mode=strict
	touch $@
