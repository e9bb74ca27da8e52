# Everything a fresh clone needs. `make help` lists the targets.
#
# .venv is made once and installed into again only when requirements.txt (or requirements-dev.txt) changes.
# Another interpreter: make PYTHON=python3.12 run

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
WORKDIR := runs/tiny
AOT := build/aot
ORACLE := tests/test_learner_oracle.py
INFERENCE := tests/test_inference.py::test_prefill_and_decode_equal_the_full_forward_for_ragged_rows
GOLDEN_TESTS := tests/test_decoder.py::test_logits_equal_those_of_transformers \
	"$(INFERENCE)[qwen2_untied]" "$(INFERENCE)[llama_tied]" "$(INFERENCE)[qwen3]" \
	$(ORACLE)::test_gspo_on_a_mesh_of_all_axes "$(ORACLE)::test_the_compiled_step_is_the_objective[as the paper has it]"

.DEFAULT_GOAL := help
.PHONY: help run test test-long test-targets test-gpu-programs faults lint

help:
	@echo "make run        train configs/tiny.py in $(WORKDIR): a small model learns by N-GRPO in about five minutes"
	@echo "make test       the test suite, about twelve minutes on two cores"
	@echo "make test-long  the long tests"
	@echo "make test-targets  compiles for TPUs and GPUs that are not here (extras aot-tpu, aot-cuda12); 20 minutes"
	@echo "make test-gpu-programs  compiles for GPUs that are not here, as CI does; fetches their compilers, about 1 GB"
	@echo "make faults     kills, signals and mutated input, each up to 55 minutes; goes on from its tallies"
	@echo "make lint       ruff, ruff format --check, mypy"
	@echo ""
	@echo "Each makes $(VENV) first when it is missing. Needs Python 3.11 or newer: make PYTHON=python3.12 run"

run: $(VENV)/.requirements
	@echo "Training configs/tiny.py in $(WORKDIR): a warm start, then N-GRPO, about five minutes on two cores."
	@echo "No accelerator is needed, and nothing is downloaded. Stop it when you like: make run goes on from there."
	$(BIN)/python -m ngrpo_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)

# Three workers keep two cores busy: some tests wait for processes that they have started.
test: $(VENV)/.requirements-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
	@echo "The model's goldens and, for the paper's objective and GSPO, the learner's oracle, compiled as in use:"
	NGRPO_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -n 3 --dist load $(GOLDEN_TESTS)

test-long: $(VENV)/.requirements-dev
	$(BIN)/python -m pytest -m long

test-targets: $(VENV)/.requirements-dev
	$(BIN)/python -m pytest -m "long or not long" tests/test_targets.py

test-gpu-programs: $(AOT)/.installed
	$(AOT)/bin/python -m pytest -k "gpus or ring" tests/test_targets.py

faults: $(VENV)/.requirements-dev
	for part in kills signals signals-to-two steady fuzz; do $(BIN)/python tests/faults/run.py $$part || exit 1; done

lint: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip says one line in each ten seconds instead of three hundred in all; its whole output is kept in the log.
define install
	@echo "Installing $(1) in $(VENV); the first time takes a few minutes."
	@$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -r $(1) \
		>$(VENV)/install.log 2>&1 & pid=$$!; seconds=0; \
	trap "kill $$pid; exit 130" INT TERM; \
	while kill -0 $$pid 2>/dev/null; do \
		sleep 1; seconds=$$((seconds + 1)); \
		[ $$((seconds % 10)) -ne 0 ] || echo "  $$seconds s: $$(grep -E '^(Collecting|Installing)' $(VENV)/install.log | tail -n 1 | cut -c 1-60)"; \
	done; \
	wait $$pid || { tail -n 20 $(VENV)/install.log >&2; \
		echo "error: pip could not install $(1); its whole output is in $(VENV)/install.log" >&2; exit 1; }
	@touch $@
endef

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer on PATH; install one, or name it:" \
		"make PYTHON=/path/to/python3.11 run" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.11 run" >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment;" \
		"on Debian and Ubuntu install its venv package first: apt install python3-venv" >&2; exit 1; }

# The package too, editable: its commands (ngrpo-train, ...) are then in the virtual environment.
$(VENV)/.requirements: requirements.txt | $(BIN)/python
	$(call install,requirements.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || { rm -f $@; exit 1; }

# The compilers for GPUs, beside $(VENV) and not in it: with jax's plugin for CUDA installed there, every command
# on a machine without a GPU would begin by looking for one. This environment sees the packages of $(VENV). Of
# the extra aot-cuda12 it has what compiling loads: the plugin, ptxas, and cuDNN, which plans attention; 1.7 GB on
# disk. cuBLAS, which cuDNN's wheel asks for (another 1 GB), is needed for running alone, hence --no-deps.
$(AOT)/.installed: pyproject.toml | $(VENV)/.requirements-dev
	@$(BIN)/python -m venv $(AOT)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(AOT)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		"jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version" nvidia-cuda-nvcc-cu12 "nvidia-cudnn-cu12>=9.8"
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(call install,requirements-dev.txt)
