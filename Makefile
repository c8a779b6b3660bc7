# Every command of the project; `make` alone lists them.
#
# Virtual environments are made where they are missing, with $(PYTHON), and installed again when a file that says
# what goes into them changes: a .stamp file in each environment remembers when that was.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
TF4 := .venv-tf4
GPTQ := .venv-gptq
GPTQMODEL := .venv-gptqmodel
PEFT050 := .venv-peft050
NEWEST := .venv-newest
OLDEST := .venv-oldest
OTHER := .venv-other-$(notdir $(PYTHON))

# Models and data come from installed packages: no run needs a model hub.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What is imported is compiled once (INSTALL compiles nothing): without it each process would take 15 seconds to start.
unexport PYTHONDONTWRITEBYTECODE

# --no-compile: most of what is installed is never imported. Twice --quiet: errors only.
INSTALL := -m pip install --quiet --quiet --no-compile
# --no-deps needs --no-warn-conflicts in every later install: pip would list what was left out on purpose.
INSTALL += --no-warn-conflicts

# A process for each core, four at most: each one holds a GB. `worksteal` keeps the tests of a file together, so that
# what they share is made once, and evens out the slow ones. ARGS="-n 0" is a single process, for a debugger.
PROCESSES := --numprocesses logical --maxprocesses 4 --dist worksteal
PYTEST := -m pytest $(PROCESSES)
# Runs that docs/tested.md keeps, unless ARGS says that they are not whole.
RECORD = tests/record.py $(1) $(if $(ARGS),,--keep) -- $(PROCESSES) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*\#\#.*/\1/p' Makefile)

help:  ## list the commands
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 22

demo: $(VENV)/demo.stamp  ## fine-tune a real model on real text, in about three minutes on two CPU cores
	$(PY) -m peftfn demo $(ARGS)

test: lint doctest  ## lint, types, doctests and tests; ARGS="-k merge" goes to the last
	$(PY) $(PYTEST) $(ARGS)

lint: $(VENV)/dev.stamp  ## ruff and pyright
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/dev.stamp  ## put the code in order
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

doctest: $(VENV)/dev.stamp  ## run the examples in the docstrings
	$(PY) -m pytest --doctest-modules peftfn

# What is timed: files of benchmarks/, which write rows to benchmarks/results/ unless they are told --quick.
BENCHMARKS := training_step saved peak forwards many convolutions graphs quantized loading merge_stream compiled
GPU_BENCHMARKS := training_step saved forwards many

# Quick runs are there to see that all of it works: two at once, and each one's output in one piece.
bench: $(VENV)/dev.stamp  ## every ratio to peft and to the bare base, into benchmarks/results/; ARGS=--quick is short and writes nothing
	@$(MAKE) --no-print-directory $(if $(findstring --quick,$(ARGS)),--jobs=2 --output-sync=target) $(BENCHMARKS:%=run-%)
	$(PY) benchmarks/report.py $(filter --quick,$(ARGS))

bench-gpu: $(VENV)/dev.stamp  ## the same on a GPU, timed by events; needs a torch that sees one
	@$(MAKE) --no-print-directory $(GPU_BENCHMARKS:%=run-%) ARGS="--device cuda $(ARGS)"
	$(PY) benchmarks/report.py $(filter --quick,$(ARGS))

run-%:
	$(PY) -W ignore benchmarks/$*.py $(ARGS)

soak: $(VENV)/dev.stamp  ## 200 adapters, 8 threads, adapters loaded and dropped, five minutes; ARGS="--minutes 1"
	$(PY) benchmarks/soak.py $(ARGS)

bench-merge: $(VENV)/dev.stamp  ## time a merge from file to file against peft and a copy (ARGS="--gb 10": 30 GB of disk), and loading
	$(PY) benchmarks/merge_stream.py $(ARGS)
	$(PY) -W ignore benchmarks/loading.py

# Where the last run stopped it goes on; ARGS=--fresh starts anew. A sample is held against what is kept of a whole run.
test-peft-suite: $(VENV)/dev.stamp  ## peft's own test tables, each case through peftfn, into benchmarks/results/; ARGS=--sample is short
	PYTHONPATH=benchmarks $(PY) -W ignore -m peft_suite $(ARGS)

zoo: $(VENV)/dev.stamp  ## every architecture of transformers, tiny, to benchmarks/results/zoo.md; goes on where it stopped (ARGS="--sample": five minutes)
	$(PY) -W ignore benchmarks/zoo/run.py $(ARGS)

transforms: $(VENV)/dev.stamp  ## write docs/transforms.md: every method under every transform, run
	$(PY) -W ignore benchmarks/transforms.py $(ARGS)

smollm2: $(VENV)/dev.stamp  ## train SmolLM2-135M with each method, and write what comes of it to benchmarks/results/
	$(PY) benchmarks/smollm2.py $(ARGS)

smollm2-quantized: $(VENV)/dev.stamp  ## the same dense, in nf4 and in 8 bits: losses and memory, to benchmarks/results/
	$(PY) -W ignore benchmarks/smollm2_quantized.py $(ARGS)

docs: $(VENV)/docs.stamp  ## write the reference to site/, from the docstrings
	$(PY) -m pdoc --docformat google --math --output-directory site peftfn

notebooks: $(VENV)/dev.stamp  ## run every notebook
	$(PY) $(PYTEST) --nbmake --nbmake-timeout=600 notebooks

test-machines: $(VENV)/dev.stamp $(NEWEST)/dev.stamp  ## the tests in three orders, with one and two threads, on other CPUs; goes on where it stopped
	@failed=0; $(PY) $(call RECORD,pinned --runs machines) || failed=1; \
	$(NEWEST)/bin/python $(call RECORD,newest --runs machines) || failed=1; exit $$failed

# Whatever is newest today: installed again each time.
test-newest:  ## the tests with the newest of every library but torch
	@rm -f $(NEWEST)/dev.stamp
	@$(MAKE) --no-print-directory $(NEWEST)/dev.stamp
	$(NEWEST)/bin/python $(call RECORD,newest)

# What asks transformers for names and ways, and clients of a model: what a new version changes. CI has no time for all.
NEWEST_PART := $(wildcard $(addprefix tests/*/test_,prompt*.py generate.py bind*.py trainer*.py transformers_names.py \
	targets.py masks.py attention.py key_shapes.py loading.py auto.py readme.py migration.py))

test-newest-part: $(NEWEST)/dev.stamp  ## of those the part that a new transformers is likely to break
	$(NEWEST)/bin/python $(PYTEST) $(NEWEST_PART) $(ARGS)

# Not in CI: a torch as old as that comes with CUDA, 6 GB.
test-oldest: $(OLDEST)/dev.stamp  ## the tests with the lowest versions that pyproject.toml allows
	$(OLDEST)/bin/python $(call RECORD,oldest)

test-python: $(OTHER)/dev.stamp  ## the tests with another Python and the pinned libraries: make test-python PYTHON=python3.13
	$(OTHER)/bin/python $(call RECORD,pinned)

test-gpu: $(VENV)/dev.stamp  ## laws, dropout, bitsandbytes, autocast and compile on a GPU; skipped where torch sees none
	$(PY) -m pytest -n 0 tests/laws/test_gpu.py $(ARGS)

test-transformers4: $(TF4)/dev.stamp  ## the tests with transformers 4.57 and peft 0.17
	$(TF4)/bin/python $(call RECORD,transformers4)

# Of those what a transformers or a peft could change: not layers alone, devices, dtypes, formats, training, the command line,
# the pages and torch's compiler.
SAME_WITH_ANY := $(addprefix --ignore=tests/,core ops training analysis weights cli project laws/test_laws.py \
	laws/test_compile.py laws/test_devices.py laws/test_dtypes.py)

test-transformers4-part: $(TF4)/dev.stamp  ## of those the part that an old transformers or peft is likely to break
	$(TF4)/bin/python $(PYTEST) $(SAME_WITH_ANY) $(ARGS)

# Not in CI, where each method but LoRA takes its turn with one format, and compiles on one kind of layer: 2,000 tests more.
test-every-base: $(VENV)/dev.stamp  ## the laws of every method on every packed format, and compiled on every kind of layer
	PEFTFN_EVERY_BASE=1 $(PY) $(PYTEST) tests/laws/test_laws.py tests/laws/test_compile.py $(ARGS)

# Not in CI: its torch is a newer one than the others', of several gigabytes.
test-gptqmodel: $(GPTQMODEL)/dev.stamp  ## bases of GPTQModel's layers against themselves and peft
	$(GPTQMODEL)/bin/python $(PYTEST) tests/weights/test_gptqmodel.py $(ARGS)

gptqmodel: $(GPTQMODEL)/dev.stamp  ## quantize layers of SmolLM2-135M with GPTQModel, and write what comes of it to benchmarks/results/
	$(GPTQMODEL)/bin/python -W ignore benchmarks/gptqmodel_run.py $(ARGS)

test-gptq: $(GPTQ)/dev.stamp  ## GPTQ bases against auto-gptq and peft 0.17, and the nine laws on them
	$(GPTQ)/bin/python $(PYTEST) tests/weights/test_gptq.py tests/laws/test_laws.py -k gptq $(ARGS)

test-peft050: $(PEFT050)/peft.stamp  ## make tests/files/peft-0.5.0 again with that peft, and compare
	@made=$$(mktemp -d) && trap 'rm -rf "$$made"' EXIT && \
	PYTHONHASHSEED=0 $(PEFT050)/bin/python -W ignore tests/make_peft_files.py "$$made" && \
	$(PEFT050)/bin/python tests/compare_peft_files.py "$$made/peft-0.5.0" tests/files/peft-0.5.0

clean:  ## remove the environments, the caches and what runs have written
	rm -rf .venv .venv-newest .venv-oldest .venv-other-* .venv-tf4 .venv-peft050 .venv-gptq .venv-gptqmodel .pytest_cache .ruff_cache build dist site peftfn-demo runs
	find benchmarks notebooks peftfn tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# $(call environment,FOLDER,SIZE): makes the virtual environment where it is missing, and says what comes next.
define environment
@test -x $(1)/bin/python || { $(PYTHON) -c "$$CHECK_PYTHON" && $(PYTHON) -m venv $(1); }
@echo "Installing into $(1): $(2), from a minute to a few ..."
endef

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f"peftfn needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Give another one: make PYTHON=python3.12 ...")
endef
export CHECK_PYTHON

$(VENV)/demo.stamp: pyproject.toml constraints.txt demo-requirements.txt
	$(call environment,$(VENV),1.5 GB)
	@$(PY) $(INSTALL) --editable '.[cli]' peft --constraint constraints.txt
	@$(PY) $(INSTALL) --no-deps --requirement demo-requirements.txt
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt demo-requirements.txt test-requirements.txt packed-requirements.txt
	$(call environment,$(VENV),2 GB)
	@$(PY) $(INSTALL) --editable '.[cli,dev]' --constraint constraints.txt
	@$(PY) $(INSTALL) --no-deps --requirement test-requirements.txt
	@$(PY) $(INSTALL) --no-deps --requirement packed-requirements.txt
	@touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt
	$(call environment,$(VENV),1.5 GB)
	@$(PY) $(INSTALL) --editable '.[cli,docs]' --constraint constraints.txt
	@touch $@

# Without the upper bounds: what is newer than what was run is what this is to find.
$(NEWEST)/dev.stamp: pyproject.toml constraints.txt demo-requirements.txt test-requirements.txt packed-requirements.txt
	$(call environment,$(NEWEST),2 GB)
	@$(NEWEST)/bin/python tests/bounds.py newest > $(NEWEST)/requirements.txt
	@grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --requirement $(NEWEST)/requirements.txt --constraint $(NEWEST)/constraints.txt
	@$(NEWEST)/bin/python $(INSTALL) --no-deps --editable .
	@$(NEWEST)/bin/python $(INSTALL) --no-deps --requirement test-requirements.txt
	@sed 's/==[^ ]*//' packed-requirements.txt > $(NEWEST)/packed.txt
	@$(NEWEST)/bin/python $(INSTALL) --no-deps --upgrade --requirement $(NEWEST)/packed.txt
	@touch $@

$(OLDEST)/dev.stamp: pyproject.toml demo-requirements.txt test-requirements.txt
	$(call environment,$(OLDEST),6 GB)
	@$(OLDEST)/bin/python tests/bounds.py oldest > $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(INSTALL) --editable '.[cli,dev]' --constraint $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/python $(INSTALL) --no-deps --requirement test-requirements.txt
	@touch $@

$(OTHER)/dev.stamp: pyproject.toml constraints.txt demo-requirements.txt test-requirements.txt packed-requirements.txt
	$(call environment,$(OTHER),2 GB)
	@$(OTHER)/bin/python $(INSTALL) --editable '.[cli,dev]' --constraint constraints.txt
	@$(OTHER)/bin/python $(INSTALL) --no-deps --requirement test-requirements.txt
	@$(OTHER)/bin/python $(INSTALL) --no-deps --requirement packed-requirements.txt
	@touch $@

$(TF4)/dev.stamp: pyproject.toml constraints-transformers4.txt demo-requirements.txt test-requirements.txt
	$(call environment,$(TF4),2 GB)
	@$(TF4)/bin/python $(INSTALL) --editable '.[cli,dev]' peft==0.17.1 --constraint constraints-transformers4.txt
	@$(TF4)/bin/python $(INSTALL) --no-deps --requirement test-requirements.txt
	@touch $@

$(GPTQ)/dev.stamp: pyproject.toml constraints-transformers4.txt
	$(call environment,$(GPTQ),1.5 GB)
	@$(GPTQ)/bin/python $(INSTALL) --editable '.[gptq]' pytest pytest-xdist --constraint constraints-transformers4.txt
	@touch $@

$(GPTQMODEL)/dev.stamp: pyproject.toml gptqmodel-requirements.txt demo-requirements.txt test-requirements.txt
	$(call environment,$(GPTQMODEL),7 GB)
	@$(GPTQMODEL)/bin/python $(INSTALL) --editable . --requirement gptqmodel-requirements.txt
	@$(GPTQMODEL)/bin/python $(INSTALL) --no-deps --requirement test-requirements.txt
	@touch $@

$(PEFT050)/peft.stamp: constraints-transformers4.txt tests/requirements-peft050.txt
	$(call environment,$(PEFT050),1 GB)
	@$(PEFT050)/bin/python $(INSTALL) --requirement tests/requirements-peft050.txt --constraint constraints-transformers4.txt
	@touch $@
