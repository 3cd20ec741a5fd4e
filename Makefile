# Everything a newcomer types. The first call of any target makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test install lint bench ui
help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/'

demo: install    ## decode four simulated subjects, end to end: pictures, scores, report, MLflow
	$(BIN)/python jobs/train_all_subjects.py

test: install    ## all tests
	$(BIN)/python -m pytest

lint: install    ## style
	$(BIN)/ruff check .

# Ray listens on loopback only.
bench: export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
bench: install   ## benchmarks: every figure is a ratio measured side by side
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/vdvae.py
	$(BIN)/python benchmarks/versatile_diffusion.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/ridge.py
	$(BIN)/python benchmarks/glm.py
	$(BIN)/python benchmarks/shared_model.py

ui: install      ## MLflow's comparison of all runs, on http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --workers 1 \
		--backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$${NSDRAY_ROOT:-$$HOME/nsdray-data}/mlflow.db}

install: $(VENV)/.installed   ## .venv with the versions of requirements.lock

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nsdray needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraints requirements.lock \
		--group dev --editable .
	touch $@
