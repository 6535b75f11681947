# Each target sets up everything it needs from nothing but Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUTPUT ?= outputs/digits-without-8
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# Long tests that prove most in the time that continuous integration has.
SLOW := tests/cli/test_interruptions.py tests/trainer/test_soak.py
OLDEST := tests/data tests/models tests/nullspace tests/reporting tests/trainer/test_adapters.py tests/trainer/test_trainer.py

.PHONY: demo test test-slow test-all test-oldest mutants audit-dependencies lint types docs wheel clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

demo: $(STAMP) ## The quickstart: train, unlearn, compare, write model, card and report (two minutes on two cores).
	@rm -rf $(OUTPUT)
	@HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_cpu_threads_per_process 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/unlearn_vit.py --output_dir $(OUTPUT)

test: $(STAMP) ## Tests: offline, on a CPU, two at a time; without the long ones.
	$(PYTEST) tests -m "not slow"

test-slow: $(STAMP) ## Long tests that continuous integration runs: kills, and a soak of many requests.
	$(PYTEST) $(SLOW) -m slow

test-all: $(STAMP) ## All tests, the long ones too.
	$(PYTEST) tests

test-oldest: $(STAMP) ## Unit tests with the oldest versions that pyproject.toml admits (of everything but torch).
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	$(BIN)/python tools/oldest_versions.py > build/oldest/constraints.txt
	build/oldest/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/oldest/bin/python -m pip freeze --quiet | grep '^torch==' >> build/oldest/constraints.txt
	build/oldest/bin/python -m pip install --quiet --constraint build/oldest/constraints.txt --editable ".[test]"
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest $(OLDEST) -n 2 --dist loadfile

mutants: $(STAMP) ## Faults planted in the mathematics one at a time, and those that no test notices (not in CI).
	OMP_NUM_THREADS=1 $(BIN)/python tools/mutants.py

audit-dependencies: ## Known vulnerabilities of the pinned versions, from PyPI's database.
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	$(PYTHON) tools/audit_dependencies.py build/audit/bin/pip-audit

lint: $(STAMP) ## ruff (lint and format), the order of the layers, lengths and private names, words of the pages.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_code.py
	$(BIN)/python tools/words.py

types: $(STAMP) ## mypy, strict.
	$(BIN)/mypy

docs: $(STAMP) ## The site, into docs/_build; warnings are errors.
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

wheel: $(STAMP) ## Build the wheel, install it in an environment of its own, and run the quickstart outside the checkout.
	rm -rf build/lib build/bdist.* build/clean build/elsewhere dist
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/clean/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	mkdir -p build/elsewhere
	cd build/elsewhere && HF_HUB_OFFLINE=1 ../clean/bin/unsc unlearn image --disable_tqdm true --output_dir digits-without-8

clean:
	rm -rf $(VENV) outputs build dist docs/_build *.egg-info
