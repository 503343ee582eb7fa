PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# The default run: real data and a pretrained model from the package index, short enough for two
# cores. Its ranker trains on 768 of the 18,719 documents of an epoch.
RETRIEVER_FLAGS := --dataset_code ml-100k-classic --device cpu --max_steps 3000 --overwrite
RANKER_FLAGS := --llm_retrieved_path experiments/lru/ml-100k-classic --device cpu \
	--llm_base_model smollm2-135m --verbalizer titles --llm_max_history 10 --max_steps 24 \
	--lora_val_iterations 24 --val_users 100 --warmup_steps 4 --overwrite

.PHONY: run test coverage faults lint format audit docs clean

run: $(VENV)/.installed
	$(PY) train_retriever.py $(RETRIEVER_FLAGS)
	$(PY) train_ranker.py $(RANKER_FLAGS)
	@echo
	@echo "943 users are too few to tell both stages from the retriever. On Games (15,264 users) their"
	@echo "NDCG@10 is .0953 against .0922, after about an hour on one core: see RESULTS.md."

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n logical

# Lines that the tests run, in their own process and in those they start.
coverage: $(VENV)/.installed-dev
	$(PY) -m pytest -n logical --cov --cov-report term

# More than two hundred kills, a failure of every call that writes, 2,000 random command lines and
# 1,000 damaged files. This takes long.
faults: $(VENV)/.installed-dev
	$(PY) -m pytest -n logical -m "slow or not slow" tests/faults

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Known vulnerabilities of the pinned versions, for information. It asks pypi.org.
audit: $(VENV)/.installed
	$(PY) -m pip install "pip-audit>=2.9,<3"
	$(PY) -m pip_audit --disable-pip --require-hashes --requirement requirements.lock

# The pages as a website, in docs/_build.
docs: $(VENV)/.installed-docs
	$(PY) -m sphinx -W --keep-going -q -c docs . docs/_build
	@echo "the first page is docs/_build/docs/index.html"

clean:
	rm -rf $(VENV)

$(VENV)/.installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --requirement requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-faiss.txt requirements-ray.txt
	$(PY) -m pip install --requirement requirements-dev.txt --requirement requirements-faiss.txt \
		--requirement requirements-ray.txt
	touch $@

$(VENV)/.installed-docs: requirements-docs.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --requirement requirements-docs.txt
	touch $@
