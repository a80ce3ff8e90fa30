# Each target does all of the set-up that it needs, once. VERSIONS chooses them: newest (requirements.txt), or common
# (requirements-common.txt), each with a Python of its own in a folder of its own.
VERSIONS ?= newest
PYTHON_VERSION_common := 3.8
PYTHON_VERSION := $(or $(PYTHON_VERSION_$(VERSIONS)),3.11)
VENV := .venv$(if $(filter-out newest,$(VERSIONS)),-$(VERSIONS))
PINS := requirements$(VENV:.venv%=%).txt
$(if $(wildcard $(PINS)),,$(error VERSIONS=$(VERSIONS) has no $(PINS); newest and common are the two))
# The first that runs: pyenv has a python3.8 on the path that may stand for none.
PYTHON ?= $(or $(shell python$(PYTHON_VERSION) -c 'import sys; print(sys.executable)' 2> /dev/null),\
  $(lastword $(wildcard $(HOME)/.pyenv/versions/$(PYTHON_VERSION).*/bin/python)),\
  $(shell command -v python3 2> /dev/null),python$(PYTHON_VERSION))

# OpenMP's waiting threads spin briefly (tools/command_line.py), unless the user chose otherwise.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

.PHONY: setup demo test test-common gpu lint pins clean

setup:
	@$(PYTHON) --version 2>&1 | grep -q '^Python $(PYTHON_VERSION)[.]' || { \
	  echo "setup: error: Python $(PYTHON_VERSION) is needed, and '$(PYTHON)' is none;" \
	    "install it or name it: make PYTHON=/path/to/python$(PYTHON_VERSION) $(MAKECMDGOALS)"; exit 1; }
	@test -f $(VENV)/.mmdet_ce_ready || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -W ignore tools/setup_env.py $(PINS)

# Train a small CE detector on a generated data set, test it, draw what it finds. The plain network's figures are means
# of seeds 0, 1, 2 (docs/does_it_help.md).
DEMO := configs/demo/mask-rcnn_r18-ce_fpn_8e_shapes.py
demo: setup
	@test -d data/shapes || $(VENV)/bin/python tools/make_shapes_dataset.py
	rm -rf work_dirs/demo
	$(VENV)/bin/python -W ignore tools/train.py $(DEMO) --work-dir work_dirs/demo
	$(VENV)/bin/python -W ignore tools/test.py $(DEMO) work_dirs/demo/epoch_8.pth --work-dir work_dirs/demo \
	  --show-dir detections
	@echo "Box and mask mAP of the network with CE: above, coco/bbox_mAP and coco/segm_mAP."
	@echo "The plain network: 0.430 and 0.455 from MMDetection's start, 0.589 and 0.599 with zero_init_residual=False."
	@echo "Each validation image with its labels and its detections: $$(ls -d work_dirs/demo/*/detections)"

test: setup $(VENV)/imagenet/.ready $(if $(filter newest,$(VERSIONS)),lint)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# What the ImageNet tests need, apart from the environment.
$(VENV)/imagenet/.ready: requirements-imagenet.txt | setup
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

# The same suite with what most users of MMDetection have, at the oldest that is supported.
test-common:
	@$(MAKE) --no-print-directory test VERSIONS=common

# What only a GPU can show: the tests, then speed, memory, kernels. The report is work_dirs/gpu/report.md.
gpu: SHELL := bash
gpu: .SHELLFLAGS := -o pipefail -c
gpu: BENCHMARK := .venv/bin/python -W ignore tools/benchmark_ce.py --device cuda --size 800 1344
gpu: setup
	@mkdir -p work_dirs/gpu
	@.venv/bin/python -m pytest tests/test_gpu | tee work_dirs/gpu/tests.txt; tests=$$?; \
	  grep -q ' passed' work_dirs/gpu/tests.txt \
	    || { echo 'gpu: error: no test of tests/test_gpu passed; if all were skipped, torch sees no GPU'; exit 1; }; \
	  { $(BENCHMARK) --what backbone host block --dtype bfloat16 float32; first=$$?; \
	    $(BENCHMARK) --what backbone profile --mode coco inference --dtype bfloat16 --compiled && exit $$first; \
	  } | tee work_dirs/gpu/report.md && exit $$tests

lint: setup
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .

# Write the pins that nobody chose, requirements*.txt, from those that somebody did, requirements*.in (pip install uv).
pins:
	@for pair in 3.11:requirements 3.8:requirements-common; do \
	  uv pip compile --quiet --python-platform linux --python-version $${pair%:*} --no-emit-package opencv-python \
	    --custom-compile-command 'make pins' --output-file $${pair#*:}.txt $${pair#*:}.in > /dev/null || exit 1; done

clean:
	rm -rf .venv .venv-common data work_dirs
