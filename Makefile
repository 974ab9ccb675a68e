# `make` is what CI runs. `make demo` and `make test` set themselves up in .venv and may be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(wildcard rust/*)

.PHONY: check test demo lint format reference bench bench-results bench-gpu results gate gate-update \
  prerequisites clean
check: test lint

test: $(VENV)/test.stamp
	cargo test --locked --quiet
	$(BIN)/python -m pytest --quiet

demo: $(VENV)/demo.stamp
	$(BIN)/bandpo demo

lint: $(VENV)/lint.stamp $(VENV)/test.stamp
	cargo fmt --check
	cargo clippy --locked --quiet --all-targets -- -D warnings
	cargo clippy --locked --quiet --features python -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest bandpo --allowlist tests/stubtest-allowed.txt

format:
	cargo fmt
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Reference bounds at 60 digits (all in build/reference, a tenth in tests/data; twenty minutes on two cores),
# and the digits that rust/real.rs is tested against.
reference: $(VENV)/reference.stamp
	$(BIN)/python tests/reference.py
	$(BIN)/python tools/make_reference.py
	$(BIN)/python tools/make_real_reference.py

# The suite once, in .venv and with torch, then the figures in benchmarks/RESULTS.md.
bench: $(VENV)/bench.stamp
	$(ASV)
	$(BIN)/python tools/make_results.py

# The same for a GPU, or a line that says what is missing.
bench-gpu: $(VENV)/bench.stamp
	@$(BIN)/python -c 'from bandpo.torch import gpu_report as r; exit(None if r().startswith("usable") else "GPU " + r())'
	$(ASV) --bench 'cuda|DeviceLoss'
	$(BIN)/python tools/make_results.py

ASV = $(BIN)/asv machine --yes >/dev/null && $(BIN)/asv run --quick \
	--environment existing:$(BIN)/python --set-commit-hash $$(git rev-parse HEAD)

# What asv measured, as Markdown.
bench-results: $(VENV)/bench.stamp
	@$(BIN)/python tools/show_benchmarks.py

# benchmarks/RESULTS.md alone.
results: $(VENV)/bench.stamp
	$(BIN)/python tools/make_results.py

# Instructions a token, which have no noise, against benchmarks/instructions.json; needs valgrind alone.
gate:
	$(PYTHON) tools/count_instructions.py

gate-update:
	$(PYTHON) tools/count_instructions.py --update

prerequisites:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "bandpo needs Python 3.10 or newer: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bandpo needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V): say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "bandpo needs Python's venv module (on Debian: apt install python3-venv)"; exit 1; }
	@command -v cargo >/dev/null || \
	  { echo "bandpo needs Rust 1.89 or newer with cargo: see https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null || \
	  { echo "bandpo needs a C linker, cc, as Rust does (on Debian: apt install gcc)"; exit 1; }
	@cargo --version | awk '{ split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 89) }' || \
	  { echo "bandpo needs Rust 1.89 or newer, found $$(cargo --version): run rustup update"; exit 1; }

# --clear, and a stamp at the end: an interrupted one is made anew.
$(VENV)/made.stamp: | prerequisites
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The extension is built in place, so that an edited .py needs no install and an edited .rs only this.
$(VENV)/%.stamp: $(VENV)/made.stamp pyproject.toml $(RUST) | prerequisites
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build target python/bandpo/_core*.so
