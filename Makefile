# `make` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# Naming the target keeps the static flags away from build scripts and procedural macros.
# Without rustc, as under sudo, what `build` named the same.
TARGET ?= $(or $(shell rustc --print host-tuple 2>/dev/null),$(shell uname -m)-unknown-linux-gnu)
STATIC = RUSTFLAGS='-C target-feature=+crt-static' $(CARGO)
RELEASE = $(CARGO_TARGET_DIR)/$(TARGET)/release
DEBUG = $(CARGO_TARGET_DIR)/$(TARGET)/debug

.PHONY: help build debug install setup lint test test-full demo bench shell clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## release binaries, static: rrun, rrun-cri, rrun-monitor
	$(STATIC) build --locked --release --target $(TARGET) -p rrun-cri
	@target=$$(tests/setup/rust-target.sh); set -x; \
	$(STATIC) build --locked --release --target $$target -p rrun; \
	[[ $$target == $(TARGET) ]] || install -m 755 $(CARGO_TARGET_DIR)/$$target/release/rrun $(RELEASE)/rrun
	@ls -l $(RELEASE)/{rrun,rrun-cri,rrun-monitor}

debug: ## the same and the end-to-end tests, quicker to build, for tests/native/run and tests/vm/run
	$(STATIC) build --locked --target $(TARGET) -p rrun -p rrun-cri -p rrun-tests

install: ## installs below PREFIX= (/usr/local) and DESTDIR=; build first
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/{rrun,rrun-cri,rrun-monitor}
	@contrib/install '$(DESTDIR)' '$(PREFIX)'

setup: ## what the tests stand on: packages, a root, clients, images (cached outside the checkout)
	@tests/setup/all.sh

lint: ## formatting, clippy, dependencies and licences, arm64
	@tests/lint/run

test: ## everything that `.ci/run` runs; at most 85 minutes from nothing
	@tests/run

test-full: ## the same and what takes longer
	@tests/run --full

demo: setup build ## an image, a pod, limits, logs: the main job with real output
	@RRUN_BIN_DIR=$(RELEASE) tests/demo.sh

bench: setup build ## rrun beside crun, runc, youki; rrun-cri beside containerd
	@tests/setup/tools.sh youki >/dev/null
	@RRUN_BIN_DIR=$(RELEASE) tests/bench/run

shell: setup build ## a shell in the guest machine, with everything in it
	@RRUN_BIN_DIR=$(RELEASE) tests/vm/shell

clean: ## removes target/; the caches in ~/.cache/rrun stay
	rm -rf $(CARGO_TARGET_DIR)
