# make demo: train a tokenizer and a VAR on this machine, draw digits, score them    make test: the tests
# make demo-flexvar: the same with FlexVAR, at several numbers of steps, sizes and shapes
# make demo-flowar: the same with FlowAR, two weightings of its loss compared
# make demo-npp: the same with NPP, against next-token training of at least equal time
# make demo-scaling: VARs of five depths, and the laws that their losses and errors follow
# make speedrun: the fastest way to digits that meet the bars of make demo; its time goes into bench/results
# make bench: the product against the published way of computing, on this machine, into bench/results
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-flexvar demo-flowar demo-npp demo-scaling speedrun test test-slow lint bench
demo demo-flexvar demo-flowar demo-npp demo-scaling:
	began=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/ready && PYTHON=$(CURDIR)/$(BIN)/python BEGAN=$$began bash recipes/$(subst -,_,$@).sh

speedrun: $(VENV)/ready
	PYTHON=$(CURDIR)/$(BIN)/python bash recipes/speedrun.sh

test: $(VENV)/ready
	$(BIN)/python -m pytest

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/ready
	$(BIN)/python -m bench.all

lint: $(VENV)/ready
	$(BIN)/ruff check .

$(VENV)/ready: requirements.txt requirements-eval.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@
