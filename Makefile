# make demo, make test: do all set-up on a fresh machine, in .venv, pinned by constraints.txt.
PYTHON ?= python3
OUT ?= runs/demo
# processes of the demo: one on a GPU, else one a core up to two
PROCESSES ?= $(shell if nvidia-smi -L >/dev/null 2>&1 || [ "$$(nproc)" = 1 ]; then echo 1; else echo 2; fi)
BIN = .venv/bin
PYTHON312 ?= python3.12
GPU_PYTHON = $(shell [ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON))

# seconds that `make gpu` may take
BUDGET ?= 420

PEERS = trl verl openrlhf

.PHONY: demo test triton36 check peers first gpu wheels triton-cache bench setup clean
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
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/kernels \
		tests/trainer/test_products.py
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests bench --benchmark-disable \
		--ignore tests/kernels --ignore tests/peers

triton36: .venv-triton36/ready  ## the kernels on the oldest Triton that pyproject.toml admits
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton36/bin/python -m pytest -q tests/kernels
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-triton36/bin/python -m pytest -q \
		tests/test_fakegpu.py tests/test_compile.py

# Its Triton, before .venv's packages.
.venv-triton36/ready: .venv/ready
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --disable-pip-version-check \
		--no-deps triton==3.6.0
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(echo $(@D)/lib/python*/site-packages)/main.pth"
	touch $@

check: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tetrad

peers: $(PEERS:%=.venv-peers/%/ready) .venv-peers/bench/ready  ## what we patch and compare with, as it is
	for peer in $(PEERS); do \
		HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-peers/$$peer/bin/python \
			-m pytest -q tests/peers/test_patch_$$peer.py tests/peers/test_bench_peers.py || exit 1; done
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 .venv-peers/bench/bin/python \
		-m pytest -q tests/peers/test_bench_peers.py

# The peers ask for versions that conflict: each gets an environment of its own, which sees .venv's
# packages (torch) behind its own. The first line of its list comes without its dependencies.
.venv-peers/%/ready: tests/peers/%.txt .venv/ready
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(echo $(@D)/lib/python*/site-packages)/main.pth"
	sed 1d $< | $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -r /dev/stdin
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "$$(head -1 $<)"
	touch $@

first:  ## on a machine with a GPU: what it should be asked first, in four minutes
	@$(GPU_PYTHON) -m bench.first

gpu:  ## on a machine with a GPU: its tests, then the benchmarks, with what is importable
	@$(GPU_PYTHON) -m bench --budget $(BUDGET)

wheels:  ## what a GPU's machine without a network may lack, in .whl (docs/bench.md)
	$(GPU_PYTHON) -m bench.wheels .whl

triton-cache: .venv-gpu/ready  ## and our kernels, compiled for its sm_90 by its Python and Triton
	CUDA_VISIBLE_DEVICES= .venv-gpu/bin/python -m bench.precompile .whl/triton-cache.tar.gz

# What the GPU's machine runs, several GB: a key of Triton's cache holds Triton itself.
.venv-gpu/ready:
	$(PYTHON312) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.11.0 triton==3.6.0 numpy
	touch $@

bench: setup  ## the same calls at small sizes on the CPU, compared with the last time they ran here
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q bench --benchmark-autosave \
		--benchmark-max-time=0.3 --benchmark-columns=min,median,iqr \
		$(if $(wildcard .benchmarks/*/*.json),--benchmark-compare)

clean:
	rm -rf .venv .venv-peers .venv-triton36 .venv-gpu .whl runs build *.egg-info
