# Each target does its own set-up on a bare Debian or Ubuntu machine, and is
# quick when that is done. Everything made here is below target/ and node_modules.
#
#   make demo [ONCE=1]   a desktop in the browser; ONCE=1 looks at it and ends
#   make test            every test, privileges demanded: run it as root
#   make check           format, lints, docs, unit tests, dependencies: no root
#   make install         qvd, its init, service, recipes, manual and completions, below DESTDIR if given, to PREFIX
#   make package         a deb and an rpm of all that, in target/package
#   make bench [JSON=1]  start latency beside the floor, runc and lxc
#   make density N=40    what so many desktops take; IDLE=1: at rest
#   make neighbour       what one desktop's attacks cost another

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.PHONY: demo test check install package bench density neighbour web init build image browser bed disk

export CARGO_TARGET_DIR ?= $(CURDIR)/target
T := $(CARGO_TARGET_DIR)
STAMP := $(T)/stamp
export PATH := $(PATH):$(HOME)/.cargo/bin:$(T)/tools/bin

INIT := $(T)/init/qvd-init
STORE := $(T)/test-store
DEMO_ROOT := $(T)/demo/state

demo: build init $(STAMP)/demo-tools
	$(T)/release/qvd-demo --qvd $(T)/release/qvd --init $(INIT) --root $(DEMO_ROOT) \
		--recipe recipes/icewm.toml --output $(T)/demo $(if $(ONCE),--once)

build: $(STAMP)/build-tools $(STAMP)/web
	cargo build --locked --release -p qvd-bin -p qvd-demo

PREFIX ?= /usr/local

install: build init
	install -D -t $(DESTDIR)$(PREFIX)/bin $(T)/release/qvd
	install -D -t $(DESTDIR)$(PREFIX)/lib/qvd $(INIT)
	$(T)/release/qvd man $(DESTDIR)$(PREFIX)/share/man/man1
	sed 's,@PREFIX@,$(PREFIX),' packaging/qvd.service | install -D -m 644 /dev/stdin $(DESTDIR)$(PREFIX)/lib/systemd/system/qvd.service
	$(T)/release/qvd completions bash | install -D -m 644 /dev/stdin $(DESTDIR)$(PREFIX)/share/bash-completion/completions/qvd
	$(T)/release/qvd completions zsh | install -D -m 644 /dev/stdin $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_qvd
	$(T)/release/qvd completions fish | install -D -m 644 /dev/stdin $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/qvd.fish
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/qvd/recipes recipes/*.toml
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/doc/qvd README.md CHANGELOG.md LICENSE-APACHE LICENSE-MIT crates/qvd-gateway/THIRD-PARTY.md

package: $(STAMP)/package-tools
	rm -rf $(T)/package
	$(MAKE) install DESTDIR=$(T)/package/root PREFIX=/usr
	scripts/package $(T)/package

# Built with other features, the same libraries are compiled once more: all that
# is tested is built by one command.
TESTED := --locked --workspace --features qvd-libvirt/libvirt
BUILD_QVD = cargo build --locked -p qvd-bin
test: BUILD_QVD = cargo nextest run $(TESTED) --no-run

test: init $(STAMP)/test-tools image browser bed disk
	QVD_TEST_PRIVILEGED=1 QVD=$(T)/debug/qvd QVD_TEST_STORE=$(STORE) QVD_INIT=$(INIT) \
		cargo nextest run $(TESTED) --profile ci
	cargo test $(TESTED) --doc
	$(T)/debug/examples/desktop $(STORE) $(INIT)
	QVD=$(T)/debug/qvd QVD_INIT=$(INIT) QVD_TEST_STORE=$(STORE) QVD_TEST_OUTPUT=$(T)/browser \
		node tests/browser/display.mjs

# The tests of one run share one store: an image takes minutes to build. Its
# recipe decides whether it is built again.
image: $(STAMP)/image-tools $(STAMP)/web
	$(BUILD_QVD)
	$(T)/debug/qvd --root $(STORE) image build recipes/icewm.toml

# A small virtual machine for tests of what this host's kernel lacks.
bed: $(T)/bed/vmlinuz

$(T)/bed/vmlinuz: scripts/bed scripts/bed-init | $(STAMP)/bed-tools
	scripts/bed $(T)/bed

# A disk with Debian on it, for tests of machines that are not ours.
disk: $(T)/disk/debian

$(T)/disk/debian: scripts/disk | $(STAMP)/image-tools $(STAMP)/test-tools
	mkdir -p $(@D)
	scripts/disk $@

browser: $(STAMP)/browser-tools tests/browser/node_modules/.package-lock.json

check: $(STAMP)/build-tools $(STAMP)/check-tools $(STAMP)/web
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --quiet
	env -u QVD_TEST_PRIVILEGED cargo nextest run --locked --workspace --lib --bins --profile ci
	cargo deny --locked --workspace check --hide-inclusion-graph licenses bans sources

# FLOOR is the source of the least that a start can cost; see docs/benchmarks.md.
FLOOR ?= ../shared/bench/floor.c
ROUNDS ?= 40

bench: init bed $(STAMP)/build-tools $(STAMP)/bench-tools
	cargo bench --locked -p qvd-node --bench compare -- \
		--floor $(abspath $(FLOOR)) --rounds $(ROUNDS) $(if $(JSON),--json)
	QVD_TEST_PRIVILEGED=1 QVD_INIT=$(INIT) cargo bench --locked -p qvd-virt -p qvd-net -p qvd-storage --bench '*'

# How many desktops fit: N of them, IDLE=1 at rest. See docs/density.md.
N ?= 40
MINUTE ?= 60

density: init image
	cargo bench --locked -p qvd-node --bench density -- --store $(STORE) --init $(INIT) --count $(N) --minute $(MINUTE) \
		$(if $(IDLE),--idle) $(if $(PICTURE),--picture $(abspath $(PICTURE)))

neighbour: init image
	cargo bench --locked -p qvd-node --bench neighbour -- --store $(STORE) --init $(INIT)

# Small counts more than fast, and no image can be trusted to have a library
# that it needs: the init is one static file.
init: $(STAMP)/build-tools
	cargo rustc --locked -p qvd-init --profile init --bin qvd-init -- -C target-feature=+crt-static

web: $(STAMP)/web

$(STAMP)/web: crates/qvd-gateway/web/package-lock.json | $(STAMP)/build-tools
	npm ci --prefix crates/qvd-gateway/web --no-audit --no-fund --ignore-scripts
	touch $@

tests/browser/node_modules/.package-lock.json: tests/browser/package-lock.json | $(STAMP)/build-tools
	npm ci --prefix tests/browser --no-audit --no-fund --ignore-scripts
	touch $@

# build-tools, image-tools, …: what scripts/tools lists under that name.
$(STAMP)/%-tools: scripts/tools
	scripts/tools $* $(T)/tools
	mkdir -p $(STAMP)
	touch $@
