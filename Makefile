# Everything runs in .venv, made on first use. `make CONSTRAINTS= ...` installs the newest versions instead.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check \
          $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# Idle threads sleep instead of spinning: beside another busy process, spinning ones starve the work itself.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-kernels test-oldest conformance conformance-skips build lint format clean

demo: .venv/.demo
	.venv/bin/python examples/retrofit_llama.py

test: .venv/.test
	.venv/bin/python -m pytest -n auto

# The kernels' logic without a GPU, in Triton's interpreter, and what else needs Triton but no GPU. The interpreter knows
# older numpy only: they live in a folder beside.
test-kernels: export PYTHONPATH = .venv/kernels:.:tests
test-kernels: .venv/.test .venv/.kernels
	.venv/bin/python -m pytest -n auto tests/test_dilated_attention_triton.py tests/test_cached_attention_triton.py \
	  tests/test_halo_attention_triton.py tests/test_liger_layers.py tests/test_cross_entropy_triton.py \
	  tests/test_decoding_token.py tests/test_backward_order.py tests/test_drawn_tiles.py tests/test_lone_blocks.py \
	  tests/test_hopper_compiled.py

# Everything again, on the oldest transformers that pyproject.toml allows.
test-oldest: .venv/.test .venv/.oldest
	PYTHONPATH=.venv/oldest .venv/bin/python -m pytest -n auto

# transformers' own tests on these models, and other people's tools on a converted checkpoint.
conformance: .venv/.conformance
	.venv/bin/python tests/transformers_suite/run.py -n auto
	PYTHONPATH=.:tests .venv/bin/python -m pytest -c tests/conformance/pytest.ini tests/conformance/tools.py \
	  tests/test_training_tools.py::test_qlora_trains_through_tiles_and_chunks tests/test_training_deepspeed.py

conformance-skips: .venv/.conformance
	.venv/bin/python tests/transformers_suite/run.py -n auto --write-skips

build: .venv/.build
	.venv/bin/python -m build --no-isolation

lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.lint
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv demo_output

# torch first and alone: whatever depends on it then takes this build as it is.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	touch $@

.venv/.demo .venv/.test .venv/.conformance: .venv/.%: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[$*]'
	touch $@

.venv/.kernels: .venv/.torch
	$(INSTALL) --target .venv/kernels 'triton>=3.6,<3.7' 'numpy<2.4'
	$(INSTALL) --target .venv/kernels --no-deps liger-kernel
	touch $@

# transformers has no dependency on torch: the one that .venv has serves both versions.
.venv/.oldest: .venv/.torch constraints-oldest.txt
	rm -rf .venv/oldest
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
	  --target .venv/oldest transformers
	touch $@

.venv/.build: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) build setuptools
	touch $@

.venv/.lint: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) ruff mypy
	touch $@
