# make        check what pip cannot bring, and install everything else into .venv
# make demo   the main job on real images, and its result
# make test   the tests (10 minutes at most on 2 cores)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test lint bench clean

# The native JPEG decoder is built at once if it is not there, and gone on without if it cannot be.
setup: $(READY)
	@$(BIN)/python -m shards.jpegcrop

demo: setup
	$(BIN)/patchmill run examples/clipart.toml

test: setup
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python bench/order.py
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/manifest.py

# Made anew only when what is installed changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) launch/prerequisites.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[track,figures,test]'
	@touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info shards/native/*.so
