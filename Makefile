# Two commands do everything: `make demo` and `make test`. `make help` explains the rest.

PYTHON ?= python3.11
PROFILE ?= tiny
PORT ?= 8080
# Which build of torch: `cpu` (the default), a CUDA version such as `cu130`, or `auto` for this machine's driver.
# An installed build stays until you ask for another.
TORCH ?= $(or $(patsubst .venv/.installed-%,%,$(firstword $(wildcard .venv/.installed-*))),cpu)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(TORCH)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true

# pip's folder of local wheels may hold torch; uv needs to be told.
LOCAL_TORCH := $(wildcard $(addsuffix /torch-*.whl,$(PIP_FIND_LINKS)))
TORCH_SOURCE := $(if $(and $(LOCAL_TORCH),$(filter cpu,$(TORCH))),--find-links $(PIP_FIND_LINKS),--torch-backend $(TORCH))
# Builds share one version number, so replacing the installed one needs an explicit request.
TORCH_AGAIN := $(if $(filter-out %/.installed-$(TORCH),$(wildcard $(VENV)/.installed-*)),--reinstall-package torch)

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this help
	@echo "Uni-ViGU: generate video, describe video, or both jointly - and train the model that does."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  TORCH=cu130     a CUDA build of torch instead of the CPU's (also: TORCH=auto)"
	@echo "  PROFILE=smoke   another profile for make demo: $(notdir $(basename $(wildcard components/profiles/*.yaml)))"
	@echo "  PORT=8081       another port than 8080 for make airflow"
	@echo "  PYTHON=...      another Python 3.11 interpreter than python3.11"

$(INSTALLED): pyproject.toml components/pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "make: Python 3.11 with its venv module is needed (Debian: apt install python3.11-venv)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt $(TORCH_SOURCE) \
		$(TORCH_AGAIN) --compile-bytecode --editable '.[dev]' --editable ./components
	@rm -f $(VENV)/.installed-*
	@touch $@

install: $(INSTALLED) ## Create the environment in .venv (other targets do this when needed)

demo: install ## From prompts to a trained and registered model (about eleven minutes on two cores)
	@univigu use $(PROFILE)
	dvc repro
	@univigu summary

smoke: ## The same steps with very little data (two minutes)
	@$(MAKE) --no-print-directory demo PROFILE=smoke

reproduce: install ## The study with short arms and one seed: reports/study.html; run it again to resume
	@univigu study run --budget short

reproduce-full: install ## The study with three seeds and the profile's steps: many hours; run it again to resume
	@univigu study run --budget full

airflow: install ## Run Airflow here, with the DAGs that retrain and promote; Ctrl-C stops it
	@python -m components.orchestration.airflow_server --port $(PORT)

measure-orchestrators: install ## What DVC, Kubeflow's local runner and Airflow add to a step (5 minutes)
	@python -m components.bench.orchestrators

architecture: install ## Which folder imports which: reports/architecture.json
	@python -m tests.architecture

cluster-claims: install ## What the operators' pages promise, with tests and sources: reports/cluster-claims.json
	@python -m tests.cluster_claims

sbom: install ## The packages of the environment, as CycloneDX: reports/sbom.json
	@uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment --output-reproducible --of JSON \
		--output-file reports/sbom.json $(BIN)/python

docs: install ## Build the documentation site in site/; `mkdocs serve` previews it
	mkdocs build --strict

# FILES="reports/scores.json reports/run.json" takes these results into docs/figures first.
figures: install ## Write the figures in README.md and docs/ from the JSON files in docs/figures
	@python docs/figures.py $(FILES)

screenshots: install ## Take the pictures in docs/studio.md with the test of the studio in a browser
	UNIVIGU_SCREENSHOTS=docs/images pytest tests/components/cli/studio/test_browser.py

profiles: install ## Write the reference of all settings and their schema: docs/profiles.md, components/profiles/schema.json
	@univigu profile reference > docs/.profiles.md && mv docs/.profiles.md docs/profiles.md
	@univigu profile schema > components/profiles/.schema && mv components/profiles/.schema components/profiles/schema.json

# more processes than two cores: now and then each waits for a server or a child
test: install ## Run all tests, lint and format included
	pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40

test-fast: install ## Run the tests that are not marked slow
	pytest --numprocesses 3 --dist loadfile -m "not slow"

# TESTS=tests/univigu measures the coverage of a part of the tests.
coverage: install ## List what no test runs, by file and function: reports/coverage.json
	pytest --numprocesses 2 --dist loadfile --cov --cov-report term --cov-report json:reports/coverage.json $(TESTS)
	@python -m tests.uncovered

chaos: install ## Kill steps, fail their disk, give them odd inputs; MINUTES=30, run it again to continue
	@python -m tests.chaos all --minutes $(or $(MINUTES),30)

lint: install ## Check style, types, spelling and the layers of imports
	ruff check .
	ruff format --check .
	lint-imports
	pyrefly check
	codespell

format: install ## Format the code
	ruff check --fix .
	ruff format .

clean: install ## Remove what runs left behind; keeps the environment, the DVC cache, mlflow.db and pretraining
	@univigu clean
