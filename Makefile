# Two commands do all the set-up on a fresh Debian or Ubuntu machine (root, apt, Go):
#   make demo   installs what is needed, builds, and runs a job in a fresh VM
#   make test   installs what the tests need, and runs them all, VMs included

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

BIN      := bin/fleetingd
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS  := -s -w -X main.version=$(VERSION)
GOBUILD  := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
TOOLS    := $(CURDIR)/.cache/tools
GOLANGCI := v2.15.0
STATICCHECK := v0.8.2
# What "make soak" runs, and how often.
COUNT    ?= 50
PACKAGES ?= ./...
# The interface of the default route, through which the demo's workers reach the internet.
EGRESS   ?= $(shell ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -1)
# A Debian mirror, if apt on this machine has none.
MIRROR   ?=
JOB      ?= 'echo "hello from $$(hostname), up $$(cut -d" " -f1 /proc/uptime) s"; uname -srm'

.PHONY: build demo test check soak lint cross bench hostlab deps clean

build: ## builds the static binaries
	$(GOBUILD) -o bin/ ./cmd/...

demo: deps build ## runs a job in a fresh VM
	$(BIN) run --var egress_interface=$(EGRESS) $(if $(MIRROR),--var mirror=$(MIRROR)) packaging/examples/quickstart/host.hcl -- $(JOB)

test: deps lint ## runs all tests, including those with VMs; nothing that can run here is skipped
	FLEETINGD_TEST=full go test -race -timeout 80m ./...

check: ## runs the tests that need neither root nor VMs: under a minute, anywhere
	go test ./...

soak: ## finds tests that fail by chance: runs the quick tests COUNT times on busy cores; takes hours
	trap 'kill $$(jobs -p)' EXIT; \
	for _ in $$(seq "$$(nproc)"); do sh -c 'while :; do :; done' & done; \
	go test -race -count=$(COUNT) -timeout 6h $(PACKAGES)

lint: $(TOOLS)/golangci-lint-$(GOLANGCI) $(TOOLS)/staticcheck-$(STATICCHECK)
	@test -z "$$(gofmt -l $$(git ls-files '*.go') | tee /dev/stderr)"
	go vet ./...
	$(TOOLS)/staticcheck-$(STATICCHECK) ./...
	$(TOOLS)/golangci-lint-$(GOLANGCI) run

$(TOOLS)/golangci-lint-$(GOLANGCI):
	GOBIN=$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI)
	mv $(TOOLS)/golangci-lint $@

$(TOOLS)/staticcheck-$(STATICCHECK):
	GOBIN=$(TOOLS) go install honnef.co/go/tools/cmd/staticcheck@$(STATICCHECK)
	mv $(TOOLS)/staticcheck $@

cross: ## builds for all architectures
	for arch in amd64 arm64 riscv64; do GOARCH=$$arch $(GOBUILD) -o bin/$$arch/ ./cmd/...; done

bench: deps ## measures README's figures and more; booting real VMs takes half an hour
	FLEETINGD_TEST=full go test -p 1 -run '^$$' -bench . -skip '^BenchmarkBoot$$' ./...
	FLEETINGD_TEST=full go test -run '^$$' -bench '^BenchmarkBoot$$' -benchtime 3x -timeout 2h ./cmd/fleetingd

hostlab: deps build ## opens a shell in a throw-away Debian host with systemd, KVM and the binary inside
	go run ./appliance/hostlab/shell $(BIN)

deps: ## installs the required Debian packages; does nothing if they are installed
	packaging/deps.sh

clean:
	rm -rf bin
