# Two commands on a fresh machine:  make demo   and   make test
PYTHON ?= python3
VENV   := .venv
BIN     = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
INSTALL = $(BIN)/pip install --quiet -c $(CONSTRAINTS)
# What a contributor runs between two edits: something of every room, in a minute on two cores.
QUICK   = tests/test_layout.py \
	tests/sources/test_tensor_files.py tests/graph/test_expressions.py tests/graph/ops/test_timid_rows.py \
	tests/analysis/test_obstacles.py tests/transforms/test_maps.py tests/passes/test_conv_bn.py \
	tests/planning/test_lockfile.py tests/planning/test_hostile_plans.py tests/proof/test_judging.py \
	tests/modules/test_codegen.py tests/modules/test_saved_bytes.py \
	tests/torch_compile/test_backend.py::test_batch_norms_are_gone_before_the_inner_backend \
	tests/torch_compile/test_backend.py::test_a_pass_that_is_wrong_does_not_reach_the_model \
	tests/exporters/test_lowering.py tests/stripping/test_schedule.py \
	tests/cli/test_cli.py::test_rewrite_tells_what_it_did_and_writes_beside_the_model tests/cli/test_deadline.py \
	tests/nn/test_convolutions.py tests/nn/test_other_norms.py
export OMP_NUM_THREADS ?= 1

.PHONY: demo test quick test-all test-latest fuzz lock lint bench clean
.DELETE_ON_ERROR:

# torch first and pinned: another package would pull a build of several gigabytes. Everything else that is installed is pinned
# too (constraints.txt, made by `make lock`), and what builds the package is what is installed, not what is newest.
$(VENV)/base: $(CONSTRAINTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	$(INSTALL) --no-build-isolation -e '.[cpu]'
	touch $@

# timm names torchvision, whose registry build names CUDA: both come without their dependencies.
$(VENV)/dev: $(VENV)/base
	$(INSTALL) --no-deps torchvision timm
	$(INSTALL) --no-build-isolation -e '.[cpu,zoo,dev]'
	touch $@

# The newest of everything but torch, and what came out of it as the next constraints.txt.
lock:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/dev VENV=.venv-latest CONSTRAINTS=constraints.in
	echo '# made by `make lock` from constraints.in; do not edit' > constraints.txt
	.venv-latest/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+[a-z0-9.]*$$//' >> constraints.txt

# A smoke set on the newest versions of everything, so that drift is seen here first.
test-latest:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/dev VENV=.venv-latest CONSTRAINTS=constraints.in
	.venv-latest/bin/pip list
	.venv-latest/bin/python -m pytest -n 2 --dist loadgroup $(QUICK) tests/exporters tests/zoo/test_zoo_rewrites.py

demo: $(VENV)/base
	mkdir -p out
	$(BIN)/normfuse rewrite examples/tiny_gpt.pt2 --pass pre_rmsnorm -o out/tiny_gpt.rms.pt2 --report out/report.json
	$(BIN)/normfuse export out/tiny_gpt.rms.pt2 --to onnx -o out/tiny_gpt.rms.onnx
	$(BIN)/python examples/sample_text.py examples/tiny_gpt.pt2 "The history of "
	$(BIN)/python examples/sample_text.py out/tiny_gpt.rms.pt2 "The history of "

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

quick: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(QUICK)

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --run-slow

# Damaged and hostile files, random models, and kills at every writing command; what fails is kept in tests/fuzz/kept.
FUZZ_SECONDS ?= 3600
FUZZ_SEED ?= 1
fuzz: $(VENV)/dev
	mkdir -p out
	$(BIN)/python -W ignore -m tests.fuzz --part files --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --jobs 2 --json out/fuzz_files.json
	$(BIN)/python -W ignore -m tests.fuzz --part graphs --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --jobs 2 --json out/fuzz_graphs.json
	$(BIN)/python -W ignore -m tests.fuzz --part kills --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --kills 40 --json out/fuzz_kills.json

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Hours; each keeps its tables in benchmarks/results and says what has changed since the last run.
bench: $(VENV)/dev
	$(BIN)/pip install --quiet --no-deps -r benchmarks/requirements.txt
	for name in planning_scale planning_large memory fold_patterns fold_speed rms_norm pre_norms crms_norm tune strip_whisper; do \
		$(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.strip --models "1 × 128"

clean:
	rm -rf $(VENV) .venv-latest out
