# The project's commands. Each sets up what it needs: a virtual environment in .venv, made by PYTHON.
#   make serve   the main job: `vllm serve` over Ray on NPUs (MODEL=, SERVE_ARGS=, PORT=, SERVE_ONCE=1)
#   make test    all tests; make test-matrix: also the slow combinations
#   make test-faults  faults of every kind in every phase, or FAULTS_COUNT random ones (FAULTS_SEED)
#   make check-patches   patches/ against every supported release of upstream
#   make contract  what we rely on in upstream, in every supported release (CONTRACT='vllm==0.34.0': in these)
#   make test-release RELEASES='vllm=0.32.0'   the basic tests with other releases of upstream
#   make test-upstream   vLLM's own tests of its Ray executor and its message queue, against ours (GROUPS=)
#   make lint    ruff and mypy; the pipelines, container files and manifests against their schemas
#   make docs    the documentation, into site/; make docs-serve shows it while it is written
#   make bench   compare executors (BENCH_ARGS='--quick'); see benchmarks/README.md
#   make bench-transport  a tensor from NPU to NPU by every way (BENCH_ARGS='--quick'); see benchmarks/README.md
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(name)),$(name))))
RUN := .venv/bin
ON_SOFTWARE_NPUS := $(RUN)/vllm-ray-ascend softnpu exec --
PYTEST_ARGS ?=
GROUPS ?=

.PHONY: serve test check-patches contract test-release test-matrix test-faults test-upstream lint format docs docs-serve bench bench-transport clean

serve:
	@$(PYTHON) demo/install.py
	@$(RUN)/python -m demo.serve

test:
	@$(PYTHON) demo/install.py test
	@echo '== unit tests'
	$(RUN)/python -m pytest tests/unit -n 2 --dist loadfile $(PYTEST_ARGS)
	@echo '== every supported release of upstream: what we rely on, and patches/'
	$(RUN)/python -m pytest tests/contract $(PYTEST_ARGS)
	$(RUN)/python -m ci.check_patches
	$(RUN)/python -m pytest tests/patches $(PYTEST_ARGS)
	@echo '== on software NPUs: the device layer, HCCL, the plugin, clusters'
	$(ON_SOFTWARE_NPUS) $(RUN)/python -m pytest tests/softnpu -n 3 --dist loadfile $(PYTEST_ARGS)
	@echo '== whole engines and servers'
	$(RUN)/python -m pytest tests/e2e $(PYTEST_ARGS)

test-matrix:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m pytest tests/e2e -m 'slow or not slow' $(PYTEST_ARGS)
	$(ON_SOFTWARE_NPUS) $(RUN)/python -m pytest tests/softnpu -m slow $(PYTEST_ARGS)
	$(RUN)/python -m pytest tests/patches -m slow $(PYTEST_ARGS)

test-faults:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m pytest tests/faults $(PYTEST_ARGS)

check-patches:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m ci.check_patches

contract:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m ci.contract $(CONTRACT)

test-release:
	@$(PYTHON) demo/install.py test
	$(RUN)/python -m ci.run_release $(RELEASES)

test-upstream:
	@$(PYTHON) demo/install.py test upstream
	$(RUN)/python -m ci.upstream $(GROUPS) -- $(PYTEST_ARGS)

lint:
	@$(PYTHON) demo/install.py test lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(RUN)/hadolint ci/containers/*.Dockerfile
	$(RUN)/python -m ci.manifests

format:
	@$(PYTHON) demo/install.py lint
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs:
	@$(PYTHON) demo/install.py docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict

docs-serve:
	@$(PYTHON) demo/install.py docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs serve

bench:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks $(BENCH_ARGS)

bench-transport:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.transport $(BENCH_ARGS)

clean:
	rm -rf .venv .demo build dist site ci-results *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
