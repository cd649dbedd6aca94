# Everything runs in .venv, made on first use. `make CONSTRAINTS= ...` installs the newest versions instead.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check \
          $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

# Idle threads sleep instead of spinning: beside another busy process, spinning ones starve the work itself.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-kernels lint format clean

demo: .venv/.demo
	.venv/bin/python examples/retrofit_llama.py

test: .venv/.test
	.venv/bin/python -m pytest -n auto

# The kernels' logic without a GPU, in Triton's interpreter. It knows older numpy only: both live in a folder beside.
test-kernels: export TRITON_INTERPRET = 1
test-kernels: export PYTHONPATH = .venv/kernels:.:tests
test-kernels: .venv/.test .venv/.kernels
	.venv/bin/python tests/test_dilated_attention_triton.py 0
	.venv/bin/python tests/test_dilated_attention_triton.py 1
	.venv/bin/python tests/test_cached_attention_triton.py

lint: .venv/.lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

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

.venv/.demo .venv/.test: .venv/.%: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[$*]'
	touch $@

.venv/.kernels: .venv/.torch
	$(INSTALL) --target .venv/kernels 'triton>=3.6,<3.7' 'numpy<2.4'
	touch $@

.venv/.lint: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(INSTALL) ruff
	touch $@
