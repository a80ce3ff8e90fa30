# Each target does all of the set-up that it needs, once.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3.11)

.PHONY: setup demo test test-kernels gpu lint clean

setup:
	@command -v $(PYTHON) > /dev/null || { echo "setup: error: Python 3.11 is needed and '$(PYTHON)' was not found;" \
	  "install it or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) tools/setup_env.py

# Train a small CE detector on a generated data set, benchmark it, print COCO mAP.
demo: setup
	@.venv/bin/python -W ignore tools/demo.py

test: setup lint
	@.venv/bin/python tools/setup_env.py --imagenet
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# The Triton kernels: against the float64 oracle in Triton's interpreter, and compiled for two GPUs. No GPU is needed.
test-kernels: setup
	@.venv/bin/python tools/setup_env.py --kernels
	@OMP_NUM_THREADS=1 PYTHONPATH=.venv/kernels TRITON_INTERPRET=1 .venv/bin/python -m pytest -n auto tests/test_kernels
	@PYTHONPATH=.venv/kernels .venv/bin/python -m pytest -n auto tests/test_kernels/test_compile.py

# What only a GPU can show: tests, speed, a profile, a short training; one report, work_dirs/gpu/report.md.
gpu: setup
	@.venv/bin/python tools/gpu_report.py

lint: setup
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .

clean:
	rm -rf .venv data work_dirs
