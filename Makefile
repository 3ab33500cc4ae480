# make demo   sets everything up, trains on the embedded Shapes pictures, evaluates, draws
# make test   sets everything up, runs the tests
# PYTHON=python3.12 VENV=/some/where make demo   takes another interpreter, another place

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-long notebooks check-notebooks assets lint

$(READY): requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \"Python 3.11 or newer is needed: make PYTHON=python3.12\")"
	$(PYTHON) -m venv $(VENV)
	echo '*' > $(VENV)/.gitignore
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)

demo: $(READY)
	@rm -rf runs/demo
	@start=$$(date +%s) && \
	$(RUN) train.py --preset shapes --output runs/demo && \
	$(RUN) evaluate.py --weights runs/demo/last.pt --output runs/demo --workers 0 --per-class && \
	$(RUN) visualize.py --weights runs/demo/last.pt --output runs/demo && \
	echo "demo: $$(( ($$(date +%s) - start) / 60 )) min $$(( ($$(date +%s) - start) % 60 )) s;" \
	     "pictures in runs/demo: detections.png, stages.png, curves.png"

test: $(READY)
	$(RUN) -m pytest

test-long: $(READY)
	$(RUN) -m pytest -m long

# Executes every notebook afresh and writes its outputs; an error stops it.
notebooks: $(READY)
	$(RUN) -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False --log-level WARN \
	    notebooks/*.ipynb

# The same into runs/notebooks; the files in notebooks/ stay as they are.
check-notebooks: $(READY)
	$(RUN) -m nbconvert --to notebook --execute --output-dir runs/notebooks --log-level WARN notebooks/*.ipynb

# The checkpoint in assets/ and the README's pictures of it, anew: about 25 minutes on 2 CPU cores. Notebooks and tests use it.
assets: $(READY)
	@rm -rf runs/assets
	$(RUN) train.py --preset shapes --num-stages 6 --epochs 20 --eval-every 5 --output runs/assets
	$(RUN) -m tools.convert runs/assets/last.pt assets/shapes.pt --half
	$(RUN) visualize.py readme

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
