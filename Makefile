# `make` without a target lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# The Rust target that .cargo/config.toml selects. Under sudo, rustc is often not in PATH. The
# default value is then the name that rustc prints on a machine with glibc.
TARGET ?= $(or $(shell rustc --print host-tuple 2>/dev/null),$(shell uname -m)-unknown-linux-gnu)
RELEASE = $(CARGO_TARGET_DIR)/$(TARGET)/release
DIST = $(CARGO_TARGET_DIR)/$(TARGET)/dist

.PHONY: help build dist debug install setup format lint test test-full fuzz demo bench shell clean

help: ## prints this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# rrun is small, so every optimised build of rrun uses LTO across all crates.
# tests/setup/rust-target.sh prints rrun's target, which can differ from the target of the other
# binaries.
define build_rrun
	@target=$$(tests/setup/rust-target.sh); set -x; \
	$(CARGO) build --locked --profile dist --target $$target -p rrun; \
	[[ $(CARGO_TARGET_DIR)/$$target/dist -ef $(1) ]] || install -m 755 $(CARGO_TARGET_DIR)/$$target/dist/rrun $(1)/rrun
	@ls -l $(1)/{rrun,rrun-cri,rrun-monitor}
endef

build: ## compiles optimised static binaries (rrun, rrun-cri, rrun-monitor); fast after a change
	$(CARGO) build --locked --release -p rrun-cri -p rrun-monitor
	$(call build_rrun,$(RELEASE))

dist: ## compiles the binaries to install, with LTO across all crates and a fifth smaller; takes minutes
	$(CARGO) build --locked --profile dist -p rrun-cri -p rrun-monitor
	$(call build_rrun,$(DIST))

debug: ## compiles all programs and end-to-end tests, unoptimised, for tests/native/run and tests/vm/run
	$(CARGO) build --locked --workspace

install: ## installs the binaries of `make dist` below PREFIX= (/usr/local) and DESTDIR=
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(DIST)/{rrun,rrun-cri,rrun-monitor}
	@contrib/install '$(DESTDIR)' '$(PREFIX)'

setup: ## installs and builds packages, a root, clients and images for the tests (cached outside the checkout)
	@tests/setup/all.sh

format: ## formats the Rust sources, including the end-to-end tests that `cargo fmt` does not find
	@tests/lint/format

lint: ## checks formatting, clippy, module loops, plain English, commits, dependencies, arm64
	@tests/lint/run

test: ## runs the tests and lints that CI runs; at most 75 minutes with empty caches, and 40 otherwise
	@tests/run

test-full: ## runs all tests of `make test`, and the tests that take longer
	@tests/run --full

fuzz: ## fuzzes the parser TARGET= for SECONDS= (60); without TARGET, fuzzes each parser in turn
	@tests/fuzz/run '$(if $(filter command line,$(origin TARGET)),$(TARGET))' '$(if $(filter command line,$(origin SECONDS)),$(SECONDS),60)'

demo: ## shows an image, a pod, limits and logs with real output; 10 minutes with empty caches
	@tests/setup/demo.sh
	@RRUN_BIN_DIR=$(RELEASE) tests/demo.sh

bench: setup dist ## compares rrun with crun, runc and youki, and rrun-cri with containerd
	@tests/setup/tools.sh youki >/dev/null
	@RRUN_BIN_DIR=$(DIST) tests/bench/run

shell: setup build ## opens a shell in the guest machine, with all binaries, clients and test images
	@RRUN_BIN_DIR=$(RELEASE) tests/vm/shell

clean: ## removes target/; the caches in ~/.cache/rrun remain
	rm -rf $(CARGO_TARGET_DIR)
