# `make` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# The target that .cargo/config.toml builds for. rustc may be missing under sudo: then the default
# is the name that rustc gave to `build`.
TARGET ?= $(or $(shell rustc --print host-tuple 2>/dev/null),$(shell uname -m)-unknown-linux-gnu)
RELEASE = $(CARGO_TARGET_DIR)/$(TARGET)/release
DIST = $(CARGO_TARGET_DIR)/$(TARGET)/dist

.PHONY: help build dist debug install setup format lint test test-full demo bench shell clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# rrun is small, so every build optimises it over all crates. It is built for a target of its own.
define build_rrun
	@target=$$(tests/setup/rust-target.sh); set -x; \
	$(CARGO) build --locked --profile dist --target $$target -p rrun; \
	[[ $(CARGO_TARGET_DIR)/$$target/dist -ef $(1) ]] || install -m 755 $(CARGO_TARGET_DIR)/$$target/dist/rrun $(1)/rrun
	@ls -l $(1)/{rrun,rrun-cri,rrun-monitor}
endef

build: ## optimised static binaries, quick after a change: rrun, rrun-cri, rrun-monitor
	$(CARGO) build --locked --release -p rrun-cri -p rrun-monitor
	$(call build_rrun,$(RELEASE))

dist: ## the binaries to install, optimised over all crates: a fifth smaller; takes minutes
	$(CARGO) build --locked --profile dist -p rrun-cri -p rrun-monitor
	$(call build_rrun,$(DIST))

debug: ## all programs and the end-to-end tests, unoptimised, for tests/native/run and tests/vm/run
	$(CARGO) build --locked --workspace

install: ## installs the binaries of `make dist` below PREFIX= (/usr/local) and DESTDIR=
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(DIST)/{rrun,rrun-cri,rrun-monitor}
	@contrib/install '$(DESTDIR)' '$(PREFIX)'

setup: ## what the tests stand on: packages, a root, clients, images (cached outside the checkout)
	@tests/setup/all.sh

format: ## formats the Rust sources, the end-to-end tests too, which `cargo fmt` alone does not find
	@tests/lint/format

lint: ## formatting, clippy, loops of modules, long functions, dependencies and licences, arm64
	@tests/lint/run

test: ## everything that `.ci/run` runs; at most 75 minutes with empty caches, 40 otherwise
	@tests/run

test-full: ## the same and what takes longer
	@tests/run --full

demo: ## an image, a pod, limits, logs: the main job with real output; 10 minutes with empty caches
	@tests/setup/demo.sh
	@RRUN_BIN_DIR=$(RELEASE) tests/demo.sh

bench: setup dist ## rrun beside crun, runc, youki; rrun-cri beside containerd
	@tests/setup/tools.sh youki >/dev/null
	@RRUN_BIN_DIR=$(DIST) tests/bench/run

shell: setup build ## a shell in the guest machine, with everything in it
	@RRUN_BIN_DIR=$(RELEASE) tests/vm/shell

clean: ## removes target/; the caches in ~/.cache/rrun stay
	rm -rf $(CARGO_TARGET_DIR)
