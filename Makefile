# penstock. `make help` lists the targets; `make run` and `make test` are all that a
# newcomer needs.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS     := -s -w -X github.com/penstock/penstock/pkg/app.Version=$(VERSION)
RATE        ?= 20
SEED        ?= 1
FOR         ?= 120s
FAILPOINTS  ?=

.PHONY: help build cross run test lint bench bench-wire bench-compress bench-sampler bench-edge bench-replay bench-writers bench-purge bench-neighbours docs sim chaos chaos-edge hostile test-oracle fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/edge, bin/router, bin/sink and bin/penstock
	@command -v $(GO) >/dev/null || { echo "make: Go 1.26 is missing: https://go.dev/doc/install" >&2; exit 1; }
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

cross: ## build every command for linux/arm64, darwin/arm64 and windows/amd64, and discard the result
	@for target in linux/arm64 darwin/arm64 windows/amd64; do \
		echo "build for $$target"; \
		CGO_ENABLED=0 GOOS=$${target%/*} GOARCH=$${target#*/} $(GO) build -o /dev/null ./cmd/... || exit 1; \
	done

run: build ## run everything on this machine, with the traffic of a small shop (RATE=20 checkouts a second)
	@scripts/run $(RATE)

test: ## run all tests; installs missing packages where it may, and reports skipped tests
	@scripts/test

lint: ## golangci-lint over every module, with the checks of .golangci.yml
	@scripts/lint

bench: bench-wire bench-compress bench-sampler bench-writers bench-edge bench-replay bench-purge bench-neighbours ## run all benchmarks

bench-wire: ## compare OTLP bytes with the collector's pdata and generated protobuf
	@cd bench && $(GO) run ./wire

bench-compress: ## compare s2 with zstd on messages of the bus
	@cd bench && $(GO) run ./compress

bench-sampler: ## measure the sampler alone, beside the collector's; BEFORE=<revision> beside an earlier one
	@cd bench && $(GO) run ./sampler $(if $(BEFORE),-before $(BEFORE))

bench-writers: ## compare the writers' work on OTLP bytes with that of the collector's exporters
	@cd bench/writers && $(GO) run .

bench-edge: ## compare the edge with an OpenTelemetry Collector, answering after the disk, with and without fsync; then catch up on an hour without a hub
	@cd bench && $(GO) run ./edge && $(GO) run ./edge -backlog

bench-purge: ## measure for how long a keeper's removal delays publishers
	@cd bench && $(GO) run ./purge

bench-replay: ## compare a replay into a backend that discards with just reading the stream
	@cd bench && $(GO) run ./replay

bench-neighbours: ## measure what other instances notice of one that floods, or that Loki refuses, fails for or is slow for
	@cd bench && $(GO) run ./neighbours

docs: ## regenerate docs/reference; CI fails when that changes anything
	$(GO) run ./docs/reference/generate docs/reference

sim: ## run the sampler through 10,000 worlds of crashes, take-overs and duplicates
	$(GO) test ./pkg/sampling/sampler -run TestSimulation -seeds 10000 -v

chaos: ## kill, pause and scale real processes for FOR=120s by the schedule of SEED=1, and count losses
	@cd test && $(GO) run ./chaos -seed $(SEED) -for $(FOR) -failpoints '$(FAILPOINTS)'

chaos-edge: ## kill one edge at every point, stop its hub, fill its disk, for FOR=120s by SEED=1, and count losses
	@cd test && $(GO) run ./chaosedge -seed $(SEED) -for $(FOR) -failpoints '$(FAILPOINTS)'

hostile: ## attack a hub with an edge's, a replay's, a router's and a gateway's credential, and check others' data after each attempt
	@cd test && $(GO) test ./hostile -count=1 -timeout 60m -v -args -whole

test-oracle: ## check metrics and logs against Prometheus's own translation, write handler and PromQL, and Loki's own parser, and sampling policies against the collector's processor
	@cd test/oracle/loki && $(GO) vet . && $(GO) test -count=1 -v .
	@cd test/oracle && $(GO) vet ./... && $(GO) test -count=1 ./... && $(GO) run . -metrics 100000 && $(GO) run ./policies -traces 10000

fuzz: ## fuzz the wire path and the formats of the bus, a minute a target
	@for target in Header Frame Decision; do \
		$(GO) test ./pkg/envelope -run '^$$' -fuzz "Fuzz$$target" -fuzztime 60s -fuzzminimizetime 10x || exit 1; done
	@$(GO) test ./pkg/membership -run '^$$' -fuzz FuzzMember -fuzztime 60s -fuzzminimizetime 10x
	@$(GO) test ./pkg/sampling/versions -run '^$$' -fuzz FuzzRecord -fuzztime 60s -fuzzminimizetime 10x
	@for target in Scan Stamp Split Cut Halve Read 'JSON$$' JSONWrite; do \
		$(GO) test ./pkg/otlpwire -run '^$$' -fuzz "Fuzz$$target" -fuzztime 60s -fuzzminimizetime 10x || exit 1; done

clean: ## remove bin and the data of make run
	rm -rf bin penstock-data
