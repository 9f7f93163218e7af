# The project's commands. Each sets up what it needs: a virtual environment in .venv, made by PYTHON.
#   make serve   the main job: `vllm serve` over Ray on NPUs (MODEL=, SERVE_ARGS=, PORT=, SERVE_ONCE=1)
#   make test    all tests (PYTEST_ARGS='-k name', RERUN=1: up to 3 failures of a suite are run again and reported as
#                flaky); make test-matrix: the slow combinations too
#   make test-faults  faults of every kind in every phase, or FAULTS_COUNT random ones (FAULTS_SEED)
#   make check-patches   patches/ against every supported release of upstream
#   make contract  what we rely on in upstream, in every supported release (CONTRACT='vllm==0.34.0': in these)
#   make test-release RELEASES='vllm=0.32.0'   the basic tests with other releases of upstream
#   make test-upstream   vLLM's own tests of its Ray executor and its message queue, against ours (GROUPS=)
#   make conformance TORCH_NPU_TESTS=FOLDER   torch_npu's own tests, of a checkout of Ascend/pytorch, and vllm-ascend's,
#                    with the plugin active (VLLM_ASCEND_TESTS=FOLDER, GROUPS=)
#   make lint    ruff and mypy; the pipelines, container files and manifests against their schemas
#   make docs    the documentation, into site/; make docs-serve shows it while it is written
#   make bench   compare executors (BENCH_ARGS='--quick'); see benchmarks/README.md
#   make bench-quick     the same in five minutes, of two layouts: for a comparison with the night before
#   make bench-steps     what an executor costs for each step, without a model; see benchmarks/README.md
#   make bench-served     what clients see of `vllm serve`, over mp and over Ray (root); see benchmarks/README.md
#   make bench-queues     messages to workers on other nodes, ours and ZeroMQ (root); see benchmarks/README.md
#   make bench-nodes      a step's message to 64 nodes of 16 ranks; see benchmarks/README.md
#   make bench-scale      what an engine's owner does, for 1 to 4,096 ranks; see benchmarks/README.md
#   make bench-recovery   data parallel ranks are killed: what the others notice, and after how long they are back (root)
#   make soak     a served engine for 30 minutes with aborts and a slow link (root); see benchmarks/README.md
#   make bench-transport  a tensor from NPU to NPU by every way (BENCH_ARGS='--quick'); see benchmarks/README.md
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.10 python3,$(if $(shell command -v $(name)),$(name))))
RUN := .venv/bin
PYTEST_ARGS ?=
RERUN ?=
# $(call suite,NAMES): the tests of those suites of ci/suites.py. All are run, and a failure of any ends make.
suite = $(RUN)/python -m ci.suite --local $(if $(filter-out 0,$(RERUN)),--rerun) $(1) --pytest $(PYTEST_ARGS)
GROUPS ?=

.PHONY: serve test check-patches contract test-release test-matrix test-faults test-upstream conformance lint format docs docs-serve bench bench-nodes bench-queues bench-quick bench-recovery bench-scale bench-served bench-steps bench-transport soak clean

serve:
	@$(PYTHON) demo/install.py
	@$(RUN)/python -m demo.serve

test:
	@$(PYTHON) demo/install.py test ray
	@$(call suite,unit)
	$(RUN)/python -m ci.check_patches
	@$(call suite,patches softnpu integration e2e)

test-matrix:
	@$(PYTHON) demo/install.py test ray
	@$(call suite,e2e)
	@$(call suite,slow)
	@$(call suite,slow-softnpu)
	@$(call suite,slow-patches)
	@$(call suite,slow-contract)

test-faults:
	@$(PYTHON) demo/install.py test
	@$(call suite,faults)

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

conformance:
	@$(PYTHON) demo/install.py test upstream conformance
	$(RUN)/python -m ci.conformance $(if $(TORCH_NPU_TESTS),--torch-npu $(TORCH_NPU_TESTS)) \
	    $(if $(VLLM_ASCEND_TESTS),--vllm-ascend $(VLLM_ASCEND_TESTS)) $(GROUPS) -- $(PYTEST_ARGS)

lint:
	@$(PYTHON) demo/install.py test lint
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(RUN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*_*.yml
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

bench-scale:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.scale $(BENCH_ARGS)

bench-served:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.served $(BENCH_ARGS)

bench-steps:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.steps $(BENCH_ARGS)

bench-quick:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.steps --cases tp1 tp2 pp2 --executors mp ours --rounds 12 --name quick $(BENCH_ARGS)

bench-queues:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.queues $(BENCH_ARGS)

bench-nodes:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.nodes $(BENCH_ARGS)

bench-transport:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.transport $(BENCH_ARGS)

bench-recovery:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.recovery $(BENCH_ARGS)

soak:
	@$(PYTHON) demo/install.py bench
	@$(RUN)/python -m benchmarks.soak $(BENCH_ARGS)

clean:
	rm -rf .venv .ray .demo build dist site ci-results *.egg-info softnpu/build softnpu/dist softnpu/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
