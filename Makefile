PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The default run of `make run`: real data and a pretrained model that come from the package index.
DATASET := ml-100k-classic
RUN_FLAGS := --seed 42 --device cpu

.PHONY: run test lint format clean

run: $(VENV)/.installed
	$(PY) train_retriever.py --dataset_code $(DATASET) $(RUN_FLAGS) --max_steps 3000
	$(PY) train_ranker.py --llm_retrieved_path experiments/lru/$(DATASET) $(RUN_FLAGS) \
		--llm_base_model smollm2-135m --max_steps 24 --lora_val_iterations 12 --warmup_steps 4 \
		--lora_lr 5e-4 --llm_max_history 10

test: $(VENV)/.installed-dev
	$(PY) -m pytest

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --requirement requirements-dev.txt
	touch $@
