# make demo   set up and size the main job on a real model        make test   set up and run all tests
# make reference   set up torch and transformers and compare with them
# make gpu    set up and measure on the GPUs of this machine (build/gpu holds the results)
# make lint   style and types                                     make scoreboard   measured against published truth
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# one file of tests to a process at a time
PARALLEL := --numprocesses auto --dist loadfile

.PHONY: demo test reference gpu lint locale scoreboard clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m compileall -q src
	touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --group test --group lint --group locale
	touch $@

$(VENV)/ready-reference: $(VENV)/ready-dev
	$(BIN)/python -m pip install --quiet --group reference
	touch $@

demo: $(VENV)/ready
	$(BIN)/ullage fit serve deepseek-v3 --on 8xH200 --engine vllm

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest $(PARALLEL)

reference: $(VENV)/ready-reference
	$(BIN)/python -m pytest $(PARALLEL) -m reference

gpu: $(VENV)/ready-reference
	$(BIN)/python -m pip install --quiet --editable '.[gpu,bench,html]'
	ULLAGE_WRITE_RECORDS=build/gpu $(BIN)/python -m pytest -m gpu tests/gpu

lint: $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

scoreboard: $(VENV)/ready
	$(BIN)/ullage validate --markdown > docs/scoreboard.md

locale: $(VENV)/ready-dev
	$(BIN)/python tools/make_locale.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
