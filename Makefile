# Two commands on a fresh machine:  make demo   and   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all lint bench clean
.DELETE_ON_ERROR:

# torch first and pinned: another package would pull a build of several gigabytes.
$(VENV)/base: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu]'
	touch $@

# timm names torchvision, whose registry build names CUDA: both come without their dependencies.
$(VENV)/dev: $(VENV)/base
	$(BIN)/pip install --quiet --no-deps torchvision==0.28.0 timm
	$(BIN)/pip install --quiet -c constraints.txt -e '.[cpu,zoo,dev]'
	touch $@

demo: $(VENV)/base
	mkdir -p out
	$(BIN)/normfuse rewrite examples/tiny_gpt.pt2 --pass pre_rmsnorm -o out/tiny_gpt.rms.pt2 --report out/report.json
	$(BIN)/normfuse export out/tiny_gpt.rms.pt2 --to onnx -o out/tiny_gpt.rms.onnx
	$(BIN)/python examples/sample_text.py examples/tiny_gpt.pt2 "The history of "
	$(BIN)/python examples/sample_text.py out/tiny_gpt.rms.pt2 "The history of "

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --run-slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev
	PYTHONPATH=. $(BIN)/python benchmarks/planning_scale.py
	PYTHONPATH=. $(BIN)/python benchmarks/memory.py
	PYTHONPATH=. $(BIN)/python benchmarks/fold_patterns.py
	PYTHONPATH=. $(BIN)/python benchmarks/fold_speed.py
	PYTHONPATH=. $(BIN)/python benchmarks/rms_norm.py
	PYTHONPATH=. $(BIN)/python benchmarks/pre_norms.py
	PYTHONPATH=. $(BIN)/python benchmarks/strip.py --models "1 × 128"

clean:
	rm -rf $(VENV) out
