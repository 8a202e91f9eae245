SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test peers worlds lint bench lock
export LOCK PYTHON TORCH_INDEX

help:  ## list what there is
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16
	@echo "ARGS='...' is passed on: make test ARGS='-k sync', make demo ARGS='steps=10'"

setup:  ## .venv from the pinned lock; LOCK=cpu|gpu, PYTHON=..., TORCH_INDEX=... (requirements/setup.sh)
	@bash requirements/setup.sh

demo: setup  ## train a small model to add, on whatever this machine has
	@.venv/bin/rlft train configs/demo.yaml $(ARGS)

test: setup  ## tests with real runs, about 20 minutes on two cores; ARGS='-m ""' runs the slow ones too
	@.venv/bin/pytest -q -m "not slow" $(ARGS)

peers: setup  ## other engines, for the tests that compare with them
	@.venv/bin/python -m pip install -q --no-deps -r requirements/peers.txt

worlds: setup  ## libraries of other worlds, for the tests that play them (needs a C compiler)
	@.venv/bin/python -m pip install -q --no-deps -r requirements/worlds.txt

lint: setup  ## ruff and pyright
	@status=0; \
	.venv/bin/ruff check . || status=1; \
	.venv/bin/ruff format --check . || status=1; \
	.venv/bin/pyright || status=1; \
	exit $$status

bench: setup  ## the benchmarks
	@.venv/bin/python -m benchmarks $(ARGS)

lock:  ## resolve the locks again (needs uv); ARGS=--upgrade moves the pins
	@bash requirements/lock.sh $(ARGS)
