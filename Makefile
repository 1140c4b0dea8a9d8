# `make` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# What .cargo/config.toml builds for. Without rustc, as under sudo, what `build` named the same.
TARGET ?= $(or $(shell rustc --print host-tuple 2>/dev/null),$(shell uname -m)-unknown-linux-gnu)
RELEASE = $(CARGO_TARGET_DIR)/$(TARGET)/release
DIST = $(CARGO_TARGET_DIR)/$(TARGET)/dist

.PHONY: help build dist debug install setup lint test test-full demo bench shell clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# rrun is small enough to be optimised as a whole each time, and is built for a target of its own.
define build_rrun
	@target=$$(tests/setup/rust-target.sh); set -x; \
	$(CARGO) build --locked --profile dist --target $$target -p rrun; \
	[[ $(CARGO_TARGET_DIR)/$$target/dist -ef $(1) ]] || install -m 755 $(CARGO_TARGET_DIR)/$$target/dist/rrun $(1)/rrun
	@ls -l $(1)/{rrun,rrun-cri,rrun-monitor}
endef

build: ## optimised binaries, static: rrun, rrun-cri, rrun-monitor; quick after a change
	$(CARGO) build --locked --release -p rrun-cri
	$(call build_rrun,$(RELEASE))

dist: ## the same, a fifth smaller, as they are installed: optimised over all crates, which takes minutes
	$(CARGO) build --locked --profile dist -p rrun-cri
	$(call build_rrun,$(DIST))

debug: ## the same and the end-to-end tests, quicker to build, for tests/native/run and tests/vm/run
	$(CARGO) build --locked --workspace

install: ## installs what `make dist` built below PREFIX= (/usr/local) and DESTDIR=
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(DIST)/{rrun,rrun-cri,rrun-monitor}
	@contrib/install '$(DESTDIR)' '$(PREFIX)'

setup: ## what the tests stand on: packages, a root, clients, images (cached outside the checkout)
	@tests/setup/all.sh

lint: ## formatting, clippy, dependencies and licences, arm64
	@tests/lint/run

test: ## everything that `.ci/run` runs; at most 75 minutes from nothing, 40 after that
	@tests/run

test-full: ## the same and what takes longer
	@tests/run --full

demo: ## an image, a pod, limits, logs: the main job with real output; 10 minutes from nothing
	@tests/setup/demo.sh
	@RRUN_BIN_DIR=$(RELEASE) tests/demo.sh

bench: setup dist ## rrun beside crun, runc, youki; rrun-cri beside containerd
	@tests/setup/tools.sh youki >/dev/null
	@RRUN_BIN_DIR=$(DIST) tests/bench/run

shell: setup build ## a shell in the guest machine, with everything in it
	@RRUN_BIN_DIR=$(RELEASE) tests/vm/shell

clean: ## removes target/; the caches in ~/.cache/rrun stay
	rm -rf $(CARGO_TARGET_DIR)
