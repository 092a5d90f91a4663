# One line each; everything runs in the project's own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
SOURCES := $(wildcard fmn_ref/*.py fmn_ref/*/*.* benchmarks/*.py benchmarks/*/*.py csrc/*/*.cpp csrc/*/*.h csrc/include/fmn/*.h) pyproject.toml setup.py constraints.txt

.PHONY: demo test bench lint cpp docs extras emulate wheel release-check clean-room clean

demo: $(VENV)/installed ; $(BIN)/fmn-ref demo
test: $(VENV)/installed ; cd tests && $(BIN)/python -m pytest --cov=fmn_ref --cov-config=../pyproject.toml --cov-report=term --cov-fail-under=90
bench: $(VENV)/installed ; $(BIN)/fmn-ref bench metric
lint: $(VENV)/installed ; $(BIN)/pip install -q -c constraints.txt ruff mypy && $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
cpp: ; cmake -S . -B build/cpp -DCMAKE_BUILD_TYPE=Release && cmake --build build/cpp && ctest --test-dir build/cpp --output-on-failure
docs: $(VENV)/installed ; $(BIN)/pip install -q -c constraints.txt ".[docs]" && $(BIN)/sphinx-build -W docs build/docs
extras: $(VENV)/installed ; .ci/extras
emulate: $(VENV)/installed ; cd tests && $(BIN)/python -m pytest package/test_cpp.py -k 'simde or aarch64' -rs
wheel: $(VENV)/installed ; FMN_REQUIRE_EXT=1 $(BIN)/pip wheel --no-deps -w dist .
release-check: ; .ci/release
clean-room: $(VENV)/installed ; .ci/release --light && rm -f benchmarks/results/clean_room.json && $(BIN)/python tests/install/clean_room.py -o benchmarks/results
clean: ; rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "Installing into $(VENV): about a minute ..."
	$(BIN)/pip install -q -c constraints.txt ".[test]"
	@touch $@
	@$(BIN)/fmn-ref info
