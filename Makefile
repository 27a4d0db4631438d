# Segue: `make demo` to see it, `make test` to check it.

CARGO ?= cargo
.DEFAULT_GOAL := help

.PHONY: help setup build demo test fmt lint bench eval clean

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

test: fmt lint build ## Format, lints, and all tests: unit, property and end-to-end with both programs
	$(CARGO) test --release --locked --workspace

bench: build ## Measure the pair on this machine
	$(CARGO) bench --locked -p edge-agent --bench ulm
	$(CARGO) run --release --locked -p segue-tests --bin bench

eval: build ## Evaluate the verifier and the openers
	$(CARGO) run --release --locked -p segue-tests --bin eval

clean: ## Remove builds and everything that setup brought
	rm -rf target .segue
