# CI runs `make`. Each target sets up what it needs in .venv, and may be repeated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CARGO_HOME ?= $(HOME)/.cargo
RUST := Cargo.toml Cargo.lock $(shell find rust cuda -type f)
CUDA ?= 13
ifdef WHEELS
ON_GPU := build/wheels.stamp
ON_GPU_PYTHON := PYTHONPATH=$(CURDIR)/build/wheels $(PYTHON)
else
ON_GPU := $(VENV)/test.stamp $(VENV)/cuda$(CUDA).stamp
ON_GPU_PYTHON := $(BIN)/python
endif

.PHONY: check test test-nvrtc test-trl test-verl test-torchrl test-ms-swift test-trainers test-gpu gpu demo lint format pictures reference wheel bench bench-results bench-gpu results gpu-visit \
  reliability gate gate-update gate-gpu gate-gpu-update prerequisites clean
check: test test-nvrtc lint

test: $(VENV)/test.stamp
	cargo test --locked --quiet
	$(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal --durations 25

# The kernels under NVIDIA's compiler, without a GPU. A target of its own, because compiler and CuPy take 550 MB.
test-nvrtc: $(VENV)/nvrtc.stamp
	$(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal tests/backends/test_nvrtc.py tests/backends/test_launch.py
	$(BIN)/python tools/count_sass.py

# The adapters to trainers against the trainers themselves. Versions conflict, so that each trainer has an environment of
# its own, which has the packages of .venv that it does not replace: PyTorch alone is most of the size. Verl finds its
# adapter by the entry point there.
test-trl: build/envs/trl.stamp
	$(IN_ENV)/trl/bin/python -m pytest --quiet -W default tests/integrations/test_trl.py

test-verl: build/envs/verl.stamp
	$(IN_ENV)/verl/bin/python -m pytest --quiet --numprocesses auto --dist worksteal -W default \
	  tests/integrations/test_verl.py tests/integrations/test_verl_hook.py tests/integrations/test_heads.py

test-torchrl: build/envs/torchrl.stamp
	$(IN_ENV)/torchrl/bin/python -m pytest --quiet -W default tests/integrations/test_torchrl.py tests/integrations/test_conformance.py

test-ms-swift: build/envs/ms-swift.stamp
	$(IN_ENV)/ms-swift/bin/python -m pytest --quiet -W default tests/integrations/test_ms_swift.py

# Packages in trainers-alone.txt go without their dependencies, which need a GPU, and their losses load alone.
test-trainers: build/envs/trainers.stamp
	$(IN_ENV)/trainers/bin/python -m pytest --quiet -rs -W default tests/integrations

IN_ENV := PYTHONPATH=python build/envs

build/envs/%.stamp: tests/integrations/requirements/%.txt $(VENV)/test.stamp
	$(PYTHON) -m venv --clear build/envs/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > build/envs/$*/packages.pth
	mv build/envs/$*/packages.pth "$$(build/envs/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	build/envs/$*/bin/python -m pip install --quiet --no-compile --requirement $<
	alone=$(basename $<)-alone.txt; ! test -f $$alone || build/envs/$*/bin/python -m pip install --quiet --no-compile --no-deps --requirement $$alone
	@touch $@

# The tests of the kernels on a GPU. `make test-gpu CUDA=12` is for an older driver or torch. On a machine without a
# registry, `make test-gpu WHEELS=folder` needs neither Rust nor a compiler. It takes all wheels in the folder, with
# that of `make wheel`, and all other packages, such as torch and CuPy, from $(PYTHON). If NVIDIA's sanitizer is
# installed, the tests run under it as well. Warnings of other versions do not fail the tests.
test-gpu: gpu $(ON_GPU)
	$(ON_GPU_PYTHON) -c 'from bandpo.backends.cuda.availability import obstacle; raise SystemExit(obstacle())'
	$(ON_GPU_PYTHON) -m pytest --quiet -rs -W default tests/backends/test_gpu.py tests/backends/test_cuda.py tests/backends/test_launch.py tests/backends/test_tokens.py

# The check for a GPU, before a target installs a package.
gpu:
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
	  { echo "needs a GPU: there is no driver of NVIDIA here (libcuda.so.1)"; exit 1; }

build/wheels.stamp: $(wildcard $(WHEELS)/*.whl)
	@test -n "$^" || { echo "there is no wheel in $(WHEELS)"; exit 1; }
	rm -rf build/wheels
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target build/wheels $^
	@touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/bandpo demo

lint: $(VENV)/lint.stamp $(VENV)/test.stamp
	cargo fmt --check
	cargo clippy --locked --quiet --all-targets -- -D warnings
	cargo clippy --locked --quiet --features python -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest bandpo --allowlist tests/stubtest-allowed.txt --mypy-config-file pyproject.toml
	$(BIN)/zizmor --offline --quiet --min-severity medium .github

format:
	cargo fmt
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Reference bounds at 60 digits: all in build/reference, a tenth in tests/data; twenty minutes on two cores. Then the
# reference digits of rust/number/dd.rs.
reference: $(VENV)/reference.stamp
	$(BIN)/python tests/support/reference.py
	$(BIN)/python tools/make_reference.py
	$(BIN)/python tools/make_cases.py
	$(BIN)/python tools/make_real_reference.py

# The pictures of the README, in docs/pictures.
pictures: $(VENV)/test.stamp
	$(BIN)/python tools/make_pictures.py

# The sdist, and from it the Linux wheel that a release uploads; checked, installed, tested. zig links against the
# glibc of 2014, so that the wheel is independent of that of the machine. The same versions give the same bytes, because
# files have the time of the commit and the binary has no path of the crates.
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheel: export RUSTFLAGS = --remap-path-prefix=$(CARGO_HOME)/registry/src=/crates
wheel: $(VENV)/release.stamp
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release --locked --sdist --out dist \
	  --zig --compatibility manylinux2014 --interpreter $(BIN)/python
	$(BIN)/python tools/make_notices.py --check
	$(BIN)/python tools/check_wheel.py dist

# One run of the asv suite in .venv, with torch, then benchmarks/RESULTS.md.
bench: $(VENV)/bench.stamp
	$(ASV)
	$(BIN)/python tools/make_results.py

# Benchmarks on a GPU, or a line with the missing requirement. With WHEELS, as for test-gpu, the kernels alone, in
# benchmarks/gpu.json.
bench-gpu: gpu $(if $(WHEELS),,$(VENV)/bench.stamp) $(ON_GPU)
	$(ON_GPU_PYTHON) tools/bench_gpu.py
ifndef WHEELS
	$(ASV) --bench 'cuda|DeviceLoss'
	$(BIN)/python tools/make_results.py
endif

# What a visit to a GPU without a registry needs, in build/visit: the wheel, and that of Liger-Kernel for its Triton loss.
# There: pip install --no-index --no-deps --target FOLDER build/visit/*.whl, then with FOLDER in PYTHONPATH
# python tools/visit_gpu.py OUTPUT. The machine needs torch, pytest, pytest-xdist, hypothesis and mpmath.
gpu-visit: $(VENV)/release.stamp
	rm -rf build/visit
	PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release --locked --out build/visit \
	  --zig --compatibility manylinux2014 --interpreter $(BIN)/python
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest build/visit liger-kernel

ASV = $(BIN)/asv machine --yes >/dev/null && $(BIN)/asv run --quick \
	--environment existing:$(BIN)/python --set-commit-hash $$(git rev-parse HEAD)

# The last figures of asv, as Markdown.
bench-results: $(VENV)/bench.stamp
	@$(BIN)/python tools/show_benchmarks.py

# benchmarks/RESULTS.md alone.
results: $(VENV)/bench.stamp
	$(BIN)/python tools/make_results.py

# Long checks that try to break the package, then docs/reliability.md; some hours. Each writes its counts to
# reliability/results, and may be run alone with fewer cases. Mutation needs the data of coverage. cargo-mutants and
# LLVM's tools are needed (cargo install cargo-mutants, rustup component add llvm-tools).
reliability: export PYTHONPATH = python:tests:.
reliability: $(VENV)/reliability.stamp
	for part in fuzz fuzz_rust expressions convexity bounds texts losses levels faults suites long_run trust \
	  coverage mutation mutation_rust; do \
	  $(BIN)/python -m reliability.$$part || exit 1; done
	$(BIN)/python tools/make_reliability.py

# Instructions a token, which have no noise, compared with benchmarks/instructions.json. The target needs valgrind and
# Rust alone.
gate:
	$(PYTHON) tools/count_instructions.py

gate-update:
	$(PYTHON) tools/count_instructions.py --update

# The same of the kernel of the loss on a GPU, run without one, compared with benchmarks/sass.json.
gate-gpu: $(VENV)/nvrtc.stamp
	$(BIN)/python tools/count_sass.py

gate-gpu-update: $(VENV)/nvrtc.stamp
	$(BIN)/python tools/count_sass.py --update

prerequisites:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "bandpo needs Python 3.10 or newer: install it, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "bandpo needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V): run make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "bandpo needs Python's venv module (on Debian: apt install python3-venv)"; exit 1; }
	@command -v cargo >/dev/null || \
	  { echo "bandpo needs Rust 1.89 or newer with cargo: see https://rustup.rs"; exit 1; }
	@command -v cc >/dev/null || \
	  { echo "bandpo needs a C linker, cc, as Rust does (on Debian: apt install gcc)"; exit 1; }
	@cargo --version | awk '{ split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 89) }' || \
	  { echo "bandpo needs Rust 1.89 or newer, found $$(cargo --version): run rustup update"; exit 1; }

# The stamp comes last, and --clear makes an interrupted environment anew.
$(VENV)/made.stamp: | prerequisites
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/release.stamp: $(VENV)/made.stamp tools/release-requirements.txt
	$(BIN)/python -m pip install --quiet --requirement tools/release-requirements.txt
	@touch $@

# The extension is built in place, so that an edited .py needs no install. An edited .rs needs this target.
$(VENV)/%.stamp: $(VENV)/made.stamp pyproject.toml $(RUST) | prerequisites
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build dist target python/bandpo/_core*.so
