# make demo   the main job on real images, and its result
# make test   the tests (10 minutes at most on 2 cores)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-slow lint bench ready prerequisites clean

demo: ready
	$(BIN)/patchmill run examples/clipart.toml

test: ready
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: ready
	$(BIN)/python bench/order.py
	$(BIN)/python bench/loader.py

prerequisites:
	@$(PYTHON) launch/prerequisites.py

# Everything installed, and the native decoder built: at once if it is there, without it if it cannot be.
ready: $(READY)
	@$(BIN)/python -m shards.jpegcrop

# Made anew only when what is installed changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) launch/prerequisites.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[track,figures,test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info shards/native/*.so
