# Segue: `make demo` to see it, `make test` to check it.

CARGO ?= cargo
.DEFAULT_GOAL := help

.PHONY: help setup build peers demo test fmt lint bench chaos fuzz soak eval train clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## Bring libtorch, build tools and the default large model into .segue/
	@python3 deploy/setup.py

build: setup ## Build both programs
	$(CARGO) build --release --locked

demo: build ## Ask the pair three questions
	@bash deploy/demo.sh

fmt: ## Check the format
	$(CARGO) fmt --all --check

lint: setup ## Clippy, with warnings denied
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

peers: ## Bring the servers that the tests talk to (llama.cpp's) into .segue/peers
	@test -x .segue/peers/bin/python || python3 -m venv .segue/peers
	@.segue/peers/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt \
	  || echo "WARNING: the peers cannot be installed here; tests that need them will say so and skip" >&2

test: fmt lint build peers ## Format, lints, and all tests: unit, property and end-to-end with both programs
	cd deploy && python3 -m unittest --quiet test_setup
	$(CARGO) test --release --locked --workspace

bench: build peers ## Measure the pair, the engine beside llama.cpp's own bench, and the proxy under load, on this machine
	$(CARGO) bench --locked -p edge-agent --bench ulm
	$(CARGO) run --release --locked -p segue-tests --bin bench
	bash tests/bring_llama_bench.sh || echo "llama.cpp's own bench cannot be built here: see .segue/llama.cpp/build.log" >&2
	$(CARGO) run --release --locked -p segue-tests --bin engine
	$(CARGO) run --release --locked -p segue-tests --bin load

chaos: build ## A thousand turns that a fault strikes: networks, killed servers, full disks, clocks
	bash tests/bring_toxiproxy.sh
	$(CARGO) run --release --locked -p segue-tests --bin chaos

fuzz: build ## Ten million broken inputs at every place that decodes one
	$(CARGO) run --release --locked -p segue-tests --bin fuzz

soak: build ## Ten minutes of 2,000 idle and 500 active streams: memory must stay flat
	$(CARGO) run --release --locked -p segue-tests --bin load -- --idle 2000 --streams 500 --turn-tokens 160 --seconds 600

eval: build ## Evaluate the verifier and the openers
	$(CARGO) run --release --locked -p segue-tests --bin eval

# Question files to train on besides the invented ones, and such that must not be trained on.
QUESTIONS ?=
EXCLUDE ?=
NEW ?= 40000
MINUTES ?= 60
PYTHON := .segue/training/venv/bin/python

train: setup ## Make a μLM from scratch into .segue/training/model (about two hours on two cores)
	test -x $(PYTHON) || python3 -m venv .segue/training/venv
	$(PYTHON) -m pip install --quiet --requirement edge-agent/training/requirements.txt
	cd edge-agent/training && root=$(CURDIR) && gguf=$$root/.segue/models/SmolLM2-135M-Instruct.Q4_1.gguf && work=$$root/.segue/training && \
	python=$$root/$(PYTHON) && \
	$$python -m ulm.data --gguf $$gguf --out $$work/openers.jsonl --new $(NEW) \
	  --questions $(abspath $(QUESTIONS)) --exclude $(abspath $(EXCLUDE)) && \
	$$python -m ulm.train --gguf $$gguf --data $$work/openers.jsonl --out $$work/model --work $$work --minutes $(MINUTES)
	@echo "The model is in .segue/training/model; try it with edge-agent --model .segue/training/model"

clean: ## Remove builds and everything that setup brought
	rm -rf target .segue
