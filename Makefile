# make demo   sets everything up, trains on the built-in Shapes images, evaluates, draws
# make test   sets everything up, runs the tests
# PYTHON=python3.12 VENV=/some/where make demo   takes another interpreter, another place

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
BCCD ?= datasets/bccd
# Mixed precision of assets-blood: "off" on a processor without bfloat16 (train.py warns of it).
AMP ?= bf16

# One process per core, at most four, with one thread each.
PROCESSES := $(shell n=$$(nproc || sysctl -n hw.ncpu); echo $$(( n > 3 ? 4 : n > 1 ? 2 : 1 )))
LAUNCH := OMP_NUM_THREADS=1 $(RUN) -m torch.distributed.run --standalone --nproc_per_node=$(PROCESSES)

.PHONY: demo test test-long notebooks check-notebooks assets assets-blood pictures lint

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \"Python 3.11 or newer is needed: make PYTHON=python3.12\")"
	$(PYTHON) -m venv $(VENV)
	echo '*' > $(VENV)/.gitignore
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(READY)

demo: $(READY)
	@rm -rf runs/demo
	@echo "demo: one process per core, at most four ($(PROCESSES) here), with one thread each"
	@start=$$(date +%s) && \
	$(LAUNCH) train.py --preset shapes --num-stages 6 --num-proposals 10 --eval-every 6 --output runs/demo && \
	$(LAUNCH) evaluate.py --weights runs/demo/last.pt --output runs/demo --workers 0 --per-class && \
	$(RUN) visualize.py --weights runs/demo/last.pt --output runs/demo && \
	echo "demo: $$(( ($$(date +%s) - start) / 60 )) min $$(( ($$(date +%s) - start) % 60 )) s;" \
	     "pictures in runs/demo: detections.png, stages.png, curves.png" && \
	echo "next, real images: $(RUN) predict.py assets/blood --weights assets/blood.pt --stages"

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(PROCESSES) --dist worksteal

test-long: $(READY)
	$(RUN) -m pytest -m long

# Executes every notebook afresh, one per core, and writes its outputs; an error stops it.
EXECUTE := OMP_NUM_THREADS=1 xargs -n 1 -P $(PROCESSES) $(RUN) -m nbconvert --to notebook --execute --log-level WARN
notebooks: $(READY)
	ls notebooks/*.ipynb | $(EXECUTE) --inplace --ExecutePreprocessor.record_timing=False

# The same into runs/notebooks; the files in notebooks/ stay as they are.
check-notebooks: $(READY)
	ls notebooks/*.ipynb | $(EXECUTE) --output-dir runs/notebooks

# The checkpoint of Shapes in assets/, anew: about 25 minutes on 2 CPU cores. Notebooks and tests use it.
assets: $(READY)
	@rm -rf runs/assets
	$(RUN) train.py --preset shapes --num-stages 6 --epochs 20 --eval-every 5 --output runs/assets
	$(RUN) -m tools.convert runs/assets/last.pt assets/shapes.pt --half
	$(MAKE) pictures

# The checkpoint of blood cells in assets/, anew, from BCCD in COCO's format (see assets/README.md).
assets-blood: $(READY)
	@rm -rf runs/blood
	$(LAUNCH) train.py --preset small --flip-vertical --amp $(AMP) --workers 0 \
	    --train-json $(BCCD)/train.json --train-images $(BCCD)/images \
	    --val-json $(BCCD)/val.json --val-images $(BCCD)/images --output runs/blood
	$(RUN) -m tools.convert runs/blood/best.pt assets/blood.pt --half
	$(MAKE) pictures

# What the README shows, from the checkpoints that are there.
pictures: $(READY)
	$(RUN) assets/make_gif.py
	$(RUN) predict.py assets/blood/BloodImage_00017.jpg --weights assets/blood.pt --output runs/pictures
	cp runs/pictures/BloodImage_00017.jpg assets/detections.jpg
	$(RUN) explore.py assets/blood/BloodImage_00017.jpg --weights assets/blood.pt \
	    --annotations assets/blood/val.json --output assets/explore.html

lint: $(READY)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
