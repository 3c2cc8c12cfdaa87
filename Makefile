# make demo, make test: do all set-up on a fresh machine, in .venv, pinned by constraints.txt.
PYTHON ?= python3
OUT ?= runs/demo
# processes of the demo: one on a GPU, else one a core up to two
PROCESSES ?= $(shell if nvidia-smi -L >/dev/null 2>&1 || [ "$$(nproc)" = 1 ]; then echo 1; else echo 2; fi)
BIN = .venv/bin
GPU_PYTHON = $(shell [ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON))

.PHONY: demo test check gpu setup clean
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $@

demo: setup  ## InstructGPT in miniature: pretrain, SFT, reward model, PPO, PPO-ptx, report
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES) --no-python $(BIN)/tetrad demo out=$(OUT)
	@echo "Open $(OUT)/report.html in a browser."

test: setup  ## kernels under Triton's interpreter, then everything else
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --ignore tests/kernels

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tetrad

gpu:  ## on a machine with a GPU: its tests, then the benchmarks, with what is importable
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
		|| { echo "make gpu: no GPU on this machine"; exit 2; }
	$(GPU_PYTHON) -m pytest -q tests/kernels
	for bench in bench/bench_*.py; do \
		$(GPU_PYTHON) -m bench.$$(basename $$bench .py) || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info
