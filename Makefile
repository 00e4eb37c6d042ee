# Needs Python 3.11 or newer and a C++ compiler. Everything lands in $(VENV); `rm -rf .venv` starts afresh.
PYTHON ?= python3
VENV ?= .venv
# An index to take torch from, for example https://download.pytorch.org/whl/cpu on a machine without an NVIDIA driver.
TORCH_INDEX ?=
DEMO ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
BUILT := pyproject.toml constraints.txt CMakeLists.txt $(wildcard shoal/kernels/csrc/*)
TESTS ?= tests
# One thread for each worker, one worker for each core.
WORKERS ?= auto

.PHONY: run test check bench prove gpu sanitize clean

run: $(VENV)/.installed
	@mkdir -p $(DEMO)
	$(BIN)/shoal run -i examples/reviews.jsonl -o $(DEMO)/answers.jsonl
	@$(BIN)/python tools/show_answers.py examples/reviews.jsonl examples/reviews.answers.jsonl $(DEMO)/answers.jsonl

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=5000 $(BIN)/python -m pytest $(TESTS) -q -rs -n $(WORKERS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	for bench in benchmarks/bench_*.py; do $(BIN)/python -m benchmarks.$$(basename $$bench .py) || exit 1; done

prove: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.prove

gpu: $(VENV)/.installed-dev
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	then $(BIN)/python -m pytest tests/cuda -q -rs; \
	else echo "No CUDA card that torch can use: tests/cuda skipped."; fi

# The compiled kernels once more, with every address checked (build/sanitize), under their own tests.
CHECKED := build/sanitize
ASAN = $(shell $(CXX) -print-file-name=libasan.so)
sanitize: $(VENV)/.installed-dev
	@if test -f "$(ASAN)"; then $(MAKE) --no-print-directory $(CHECKED)/.built checked-tests; \
	else echo "No libasan beside $(CXX): the kernels' addresses are not checked."; fi

$(CHECKED)/.built: $(BUILT)
	$(PIP) . --no-deps --upgrade --target $(CHECKED) -C build-dir=$(CHECKED)/cmake -C cmake.build-type=RelWithDebInfo \
	  -C cmake.define.SHOAL_SANITIZE=ON
	touch $@

.PHONY: checked-tests
checked-tests:
	SHOAL_CHECKED=$$(echo $(CHECKED)/shoal/kernels/_cpu*.so) OMP_NUM_THREADS=1 GOMP_SPINCOUNT=5000 \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(ASAN) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -p tools.checked_extension tests/cpu/test_*_kernels.py tests/cpu/test_threads.py -q -n $(WORKERS)

$(VENV)/.installed: $(BUILT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): the first time this downloads torch and its friends."
	$(if $(TORCH_INDEX),$(PIP) torch -c constraints.txt --index-url $(TORCH_INDEX))
	$(PIP) -e . -c constraints.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf build dist $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
