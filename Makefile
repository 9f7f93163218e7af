# The project's commands. Each sets up what it needs: a virtual environment in .venv, made by PYTHON.
#   make serve   the main job: `vllm serve` over Ray on NPUs (MODEL=, SERVE_ARGS=, PORT=, SERVE_ONCE=1)
#   make test    all tests; make test-matrix: also the slow combinations
#   make test-faults  faults of every kind in every phase, or FAULTS_COUNT random ones (FAULTS_SEED)
#   make test-upstream   vLLM's own tests of its Ray executor and its message queue, against ours (GROUPS=)
#   make lint    ruff and mypy
#   make bench   compare executors (BENCH_ARGS='--quick'); see benchmarks/README.md
#   make bench-transport  a tensor from NPU to NPU by every way (BENCH_ARGS='--quick'); see benchmarks/README.md
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(name)),$(name))))
RUN := .venv/bin
ON_SOFTWARE_NPUS := $(RUN)/vllm-ray-ascend softnpu exec --
PYTEST_ARGS ?=
GROUPS ?=

.PHONY: serve test test-matrix test-faults test-upstream lint format bench bench-transport clean

serve:
	@$(PYTHON) demo/install.py
	@$(RUN)/python -m demo.serve

test:
	@$(PYTHON) demo/install.py test
	@echo '== unit tests'
	$(RUN)/python -m pytest tests/unit $(PYTEST_ARGS)
	@echo '== on software NPUs: the device layer, HCCL, the plugin, clusters'
	$(ON_SOFTWARE_NPUS) $(RUN)/python -m pytest tests/softnpu $(PYTEST_ARGS)
	@echo '== whole engines and servers'
	$(RUN)/python -m pytest tests/e2e $(PYTEST_ARGS)

test-matrix:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m pytest tests/e2e -m 'slow or not slow' $(PYTEST_ARGS)
	$(ON_SOFTWARE_NPUS) $(RUN)/python -m pytest tests/softnpu -m slow $(PYTEST_ARGS)

test-faults:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m pytest tests/faults $(PYTEST_ARGS)

test-upstream:
	@$(PYTHON) demo/install.py test upstream
	$(RUN)/python -m ci.upstream $(GROUPS) -- $(PYTEST_ARGS)

lint:
	@$(PYTHON) demo/install.py test lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format:
	@$(PYTHON) demo/install.py lint
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

bench:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks $(BENCH_ARGS)

bench-transport:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.transport $(BENCH_ARGS)

clean:
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
