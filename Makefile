# Every target installs first what is missing in .venv; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test lab lint notebooks results harvey evidence bench gpu install clean

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat requirements.txt Makefile | cksum | cut -d' ' -f1)
# No run may reach a model hub by accident, and reports never carry the machine's name.
OFFLINE := HF_HUB_OFFLINE=1

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

install: $(STAMP) ## create .venv with the pinned requirements (the others call it)

# The stamp is written last, so an interrupted installation has none and is repaired: pip is
# asked again for every package, and all of them are imported once.
$(STAMP): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed (Debian: apt-get install python3.11 python3.11-venv), or name another with make PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot create environments; install its venv module (Debian: apt-get install python3-venv)"; exit 2; }
	@echo "[install] packages into .venv (about 5 GB, one to ten minutes)"
	@rm -f .venv/.installed-*
	@$(BIN)/python -c 'import pip' 2>/dev/null || { rm -rf .venv; $(PYTHON) -m venv .venv; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip check
	@$(BIN)/python -c 'import accelerate, jupyterlab, matplotlib, nbval, onnx, pandas, papermill, peft, rasterio, scipy, seaborn, sklearn, timm, torch, torchvision' \
	  || { rm -rf .venv; echo "error: the installation is damaged and was removed; run the same command again"; exit 2; }
	@touch $@

run: $(STAMP) ## run the notebooks on the embedded example, write reports/index.html
	@$(OFFLINE) $(BIN)/python -m tools.run_notebooks --output reports

test: $(STAMP) ## unit tests, papermill runs and nbval, offline and on the CPU; then those of a GPU
	@$(OFFLINE) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"
	@$(OFFLINE) $(BIN)/python -m pytest -m gpu -rs tests/gpu

lab: $(STAMP) ## open JupyterLab
	@$(BIN)/jupyter lab

lint: $(STAMP) ## ruff on code and notebooks, hadolint on the Dockerfile
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint Dockerfile

notebooks: $(STAMP) ## renew the committed notebooks and results, with the notebooks' defaults
	@$(OFFLINE) $(BIN)/python -m tools.run_notebooks --output reports --in_place

results: $(STAMP) ## rebuild tables, figures and README from the committed records, without training
	@$(OFFLINE) $(BIN)/python -m tools.results

harvey: $(STAMP) ## run the notebooks on data/hurricane_harvey, which you unpack there (hours)
	@$(OFFLINE) $(BIN)/python -m tools.run_notebooks --output reports/hurricane_harvey --parameters reports/hurricane_harvey/parameters.yaml

evidence: $(STAMP) ## train what stands in evidence/*.yaml, or TASKS="..." of it (hours; goes on where it stopped)
	@$(OFFLINE) $(BIN)/python -m tools.evidence $(TASKS)

bench: $(STAMP) ## measurements that take minutes and want a quiet machine
	@$(BIN)/python -m benchmarks.data_scan
	@$(OFFLINE) $(BIN)/python -m benchmarks.training_speed
	@$(OFFLINE) $(BIN)/python -m helpers.finetune --backbone dinov2_vits14 --weights random --image_size 224 --head_inputs cls --output_path runs --history_path runs
	@$(OFFLINE) $(BIN)/python -m helpers.production_benchmarking --model_path runs/head_only_example_dinov2_vits14_seed0/model_final.safetensors --results_path benchmark_results --variants eager_fp32 lora_merged compiled_fp32 onnx_int8_dynamic openvino_fp32 openvino_bf16 openvino_int8 structured_40_taylor structured_40_taylor_int8 structured_60_taylor_int8 --recovery_epochs 1 --load_variants openvino_int8 --batch_sizes 1 8 --latency_samples 60 10 --load_fractions 0.5 0.9 --competing 0
	@$(OFFLINE) $(BIN)/python -m helpers.finetune --output_path runs --history_path runs
	@$(OFFLINE) $(BIN)/python -m benchmarks.soak --model_path runs/head_only_example_example_seed0/model_final.safetensors
	@$(OFFLINE) $(BIN)/python -m benchmarks.http_load --model_path runs/head_only_example_example_seed0/model_final.safetensors
	@$(OFFLINE) $(BIN)/python -m benchmarks.soak --http --model_path runs/head_only_example_example_seed0/model_final.safetensors

gpu: $(STAMP) ## measure this project on one GPU, at most nine minutes
	@$(OFFLINE) $(BIN)/python -m benchmarks.gpu

clean: ## remove what runs leave behind, keep .venv
	@rm -rf cache runs $$(git ls-files --others --ignored --exclude-standard --directory reports) .pytest_cache .ruff_cache
