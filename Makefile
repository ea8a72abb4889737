# Each target makes the environment first: a virtual environment with every version pinned.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest

.PHONY: env demo test sky eval rl grpo-arithmetic grpo-countdown grpo-variants r1 slow lint types verify clean

env: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found: install one, or name it with make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	$(BIN)/lab sweep experiments/quickstart.py

test: env
	$(PYTEST) -n 2

sky: env
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q -c constraints.txt -e '.[sky]'

eval: env
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q -c constraints.txt -e '.[eval]'

# reasoning-gym brings one package that is compiled here: it needs a C compiler.
rl: env
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install -q -c constraints.txt -e '.[rl]'

# Studies of post-training; each goes on where it was.
grpo-arithmetic grpo-countdown grpo-variants r1: env
	JAX_PLATFORMS=cpu $(BIN)/lab sweep experiments/$(subst -,_,$@).py

slow: env
	$(PYTEST) -m slow

verify: env
	$(PYTEST) -m 'not slow or slow' --durations=20

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
