# penstock. `make help` lists what there is; `make run` and `make test` are all
# a newcomer needs.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
GO          ?= go
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS     := -s -w -X github.com/penstock/penstock/pkg/proc.Version=$(VERSION)
RATE        ?= 20

.PHONY: help build run test lint bench docs fuzz clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/edge, bin/router, bin/sink and bin/penstock
	@command -v $(GO) >/dev/null || { echo "make: Go 1.26 is missing: https://go.dev/doc/install" >&2; exit 1; }
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

run: build ## run everything on this machine, with the traffic of a small shop (RATE=20 checkouts a second)
	@scripts/run $(RATE)

test: ## run all tests; installs what is missing when it may, and names what it leaves out
	@scripts/test

lint: ## go vet, gofmt, staticcheck
	@scripts/lint

bench: ## run the benchmarks, three times each
	$(GO) test -run '^$$' -bench . -benchmem -count 3 ./...

docs: ## write docs/reference anew; CI fails when that changes anything
	$(GO) run ./docs/reference/generate docs/reference

fuzz: ## fuzz the wire path, a minute a target
	$(GO) test ./pkg/otlpwire -run '^$$' -fuzz FuzzScan -fuzztime 60s -fuzzminimizetime 10x
	$(GO) test ./pkg/otlpwire -run '^$$' -fuzz FuzzFromJSON -fuzztime 60s -fuzzminimizetime 10x

clean: ## remove bin and the data of make run
	rm -rf bin penstock-data
