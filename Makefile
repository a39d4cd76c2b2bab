# make             check what pip cannot bring, and install everything else into .venv
# make demo        the main job on real images, and its result
# make test        the tests (10 minutes at most on 2 cores)
# make test-long   whole runs and commands that take up to a minute each, half an hour in all
# make test-slow   longer ones, hours in all
# make slurm       a real Slurm cluster of two nodes on this machine (Debian's packages, as root); make slurm-stop ends it
# make test-slurm  submitting, stopping, going on and faults on such a cluster
# make test-proof  eight faults of make proof
# make proof       four stages under 50 faults, drawn from SEED, beside the same ones undisturbed (root; 15 to 30 minutes)
# make soak        an hour of training, watched: memory, descriptors, threads, step time, checkpoints (MINUTES=60)
# make peers       other projects' readers, loaders and models, into .venv-peers
# make test-peers  our shards in their hands; our models and converted weights beside theirs
# make lint        style, by ruff
# make types       the types, by mypy
# make coverage    the tests again, folder by folder, and which lines they ran, subprocesses too: build/coverage.txt;
#                  some 40 minutes; TESTS=tests/shards for a part
# make docs        the pages and pictures that are made of the code, and a check of every page
# make bench       speed and memory, on a quiet machine; what needs no other project
# make bench-peers the same, then ours beside other projects'
# make clean       remove what was installed and made
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PEERS  := .venv-peers
SEED   ?= 1
TESTS  ?= $(filter-out %__pycache__/,$(sort $(wildcard tests/*/ tests/test_*.py)))
MINUTES ?= 60
XDIST  := --numprocesses auto --dist loadfile --no-loadscope-reorder
PIP    := python -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test test-long test-slow slurm slurm-stop test-slurm test-proof proof soak test-peers peers lint types coverage \
	docs bench bench-peers clean

# The native JPEG decoder is built at once if it is not there, and gone on without if it cannot be.
setup: $(READY)
	@$(BIN)/python -m shards.jpegcrop

demo: setup
	$(BIN)/patchmill run examples/clipart.toml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(XDIST)

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "long and not slow" $(XDIST)

test-slow: setup
	$(BIN)/python -m pytest -m slow

slurm: $(READY)
	@$(BIN)/python tests/slurm/cluster.py start

slurm-stop:
	@$(PYTHON) tests/slurm/cluster.py stop

test-slurm: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

test-proof: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm and not slow" tests/proof

proof: setup
	$(BIN)/python tests/proof/prove.py --seed $(SEED)

soak: setup
	$(BIN)/python tests/proof/soak.py --minutes $(MINUTES) --picture docs/soak.png

test-peers: setup peers
	$(BIN)/python -m pytest -m peers tests/peers

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# What fails in one folder is told at the end, and the others are run nevertheless; 5 is pytest's "none of these here".
coverage: setup
	rm -f .coverage .coverage.*
	mkdir -p build
	@failed=; for part in $(TESTS); do echo "$$part"; \
		OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -m "not peers and not slow and not slurm" $(XDIST) $$part; \
		case $$? in 0|5) ;; *) failed="$$failed $$part" ;; esac; \
	done; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report > build/coverage.txt && grep TOTAL build/coverage.txt && \
	if [ "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

docs: setup
	$(BIN)/python docs/licences.py > docs/licences.md
	for page in commands settings python; do PYTHONPATH=. $(BIN)/python docs/reference.py $$page > docs/$$page.md || exit 1; done
	for picture in order architecture; do PYTHONPATH=. $(BIN)/python docs/$${picture}_picture.py > docs/$$picture.svg || exit 1; done
	$(BIN)/python -m pytest tests/test_docs.py tests/test_docs_build.py tests/test_release.py

bench: setup
	for name in order seek memory beside manifest ledger build step_overhead scale checkpoint; do $(BIN)/python bench/$$name.py || exit 1; done

bench-peers: setup peers bench
	for name in loader shuffle train_step features; do $(BIN)/python bench/$$name.py || exit 1; done

# Made anew only when what is installed changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) launch/prerequisites.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[track,figures,test]'
	@touch $(READY)

# timm and OpenCLIP ask for torchvision, a CUDA build, which would bring all of CUDA: they and it come without what they ask
# for, and the rest of that is named here. See tests/peers/read.py for how it is imported beside a CPU build of torch.
# DALI's pipeline on the CPU needs none of its decoders for the GPU; of streaming only what orders samples is used.
peers: $(PEERS)/.ready
$(PEERS)/.ready: constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(PIP) -c constraints-peers.txt torch webdataset megatron-energon huggingface_hub transformers safetensors ftfy regex pandas
	$(PEERS)/bin/$(PIP) -c constraints-peers.txt astunparse gast libcst makefun nvtx optree packaging six
	$(PEERS)/bin/$(PIP) -c constraints-peers.txt --no-deps timm open_clip_torch torchvision mosaicml-streaming \
		nvidia-dali-cuda120 nvidia-nvimgcodec-cu12
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) runs build *.egg-info shards/native/*.so
