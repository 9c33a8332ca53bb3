# make demo, make test: everything from a bare machine with python3 (3.10 or later), venv and make. See the README for
# the lines behind them.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
DEMO   := output/demo
GPU    ?=
DEVICE := $(if $(GPU),--gpu $(GPU),)

.PHONY: demo serve test slow-test check fuzz faults mutants audit house clean-demo environment

environment: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

# MINUTES bounds the whole demo, after installation, on a slow machine as on a fast one. What is kept for the last pictures
# follows what came before the training: 0.7 of it, 45 seconds at least. Each step goes on from what is there, so a stopped
# demo continues where it was, and `make demo MINUTES=60` makes the birds of a finished one better.
MINUTES ?= 15
SHOWN := --caption "a small bird with a red head, black wings and a yellow belly" \
	--caption "a large bird with striped blue wings and a white belly in the snow" \
	--caption "this bird has a green crown, a pink breast and a long beak at sunset" --per-caption 2

demo: environment
	@case "$(MINUTES)" in "" | . | *.*.* | *[!0-9.]*) echo "MINUTES=$(MINUTES): give a number of minutes, for example 15"; exit 2;; esac
	@mkdir -p $(DEMO) && date +%s > $(DEMO)/started
	@echo "1/4 first pictures: what the model that ships with the repository draws, after hours of training"
	@$(RUN) main.py --checkpoint pretrained/toybirds-ssa $(SHOWN) --out $(DEMO)/shipped --overwrite $(DEVICE)
	@echo "2/4 drawing the birds to train on"
	@$(RUN) -m datasets.prepare toybirds --root $(DEMO)/data --image-size 64
	@echo "3/4 training SSA-GAN anew, beside the encoders in pretrained/toybirds-encoders; a picture of its state every 90 seconds"
	@echo "    in $(DEMO)/*/pictures: first colours, then bodies and backgrounds, then heads, wings and legs"
	@left=$$(awk "BEGIN { before = ($$(date +%s) - $$(cat $(DEMO)/started)) / 60; kept = 0.7 * before; \
		m = $(MINUTES) - before - (kept > 0.75 ? kept : 0.75); print (m > 1 ? m : 1) }"); \
	$(RUN) main.py --cfg cfg/demo.yml --continue --set TRAIN.MAX_MINUTES $$left $(DEVICE)
	@echo "4/4 drawing test captions, and the first pictures' captions beside the model that ships"
	@$(RUN) main.py --cfg cfg/demo.yml --set B_VALIDATION True --num-images 24 --out $(DEMO)/samples --overwrite $(DEVICE)
	@$(RUN) -m sampling.side_by_side $(SHOWN) --masks --out $(DEMO)/side_by_side.png --overwrite $(DEVICE) \
		demo=$$(ls -d $(DEMO)/*-demo-ssa_gan/checkpoints/last.pth | tail -n 1) shipped=pretrained/toybirds-ssa
	@echo "$(DEMO)/side_by_side.png"
	@echo "to go on from here, for sharper birds: make demo MINUTES=$$(awk "BEGIN { print 2 * $(MINUTES) }")"

clean-demo:
	rm -rf $(DEMO)

# The page and the API on MODEL: a checkpoint or a published model's folder; without it the one that ships with the
# repository, else the demo's.
MODEL  ?= $(firstword $(wildcard pretrained/*/config.json) $(wildcard $(DEMO)/*/checkpoints/last.pth))

serve: $(VENV)/installed-serve
	@test -n "$(MODEL)" || { echo "no model to serve; run 'make demo' first, or give MODEL=path"; exit 2; }
	$(RUN) -m serve --checkpoint $(patsubst %/config.json,%,$(MODEL))

$(VENV)/installed-serve: requirements-serve.txt $(VENV)/installed
	$(RUN) -m pip install --quiet -r requirements-serve.txt
	touch $@

# One process a core, four at most: each takes some 1.5 GB. A file's tests stay together, since they share what they trained.
TEST := $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

test: environment
	$(TEST)

slow-test: environment
	$(TEST) -m slow

check: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check

# Odd inputs of every kind, seeded; docs/reliability.md has what it found.
N    ?= 5000
SEED ?= 1

fuzz: environment
	$(RUN) tests/fuzz/run.py --number $(N) --seed $(SEED)

# Faults at random moments of small trainings, seeded; about two seconds each.
faults: N := 500
faults: environment
	$(RUN) tests/faults/run.py --number $(N) --seed $(SEED)

# Does the suite notice faults of one line? Those of tests/mutants/faults.txt and N more, drawn by SEED. Hours on a slow core;
# ONLY=eval/ takes a room or file alone. docs/reliability.md has what it found.
ONLY ?=

mutants: N := 40
mutants: environment
	$(RUN) tests/mutants/run.py --number $(N) --seed $(SEED) --only "$(ONLY)"

# Known holes in what is installed; wants the internet.
audit: environment
	$(RUN) -m pip install --quiet pip-audit
	$(RUN) tests/audit.py

# The drawing in docs/architecture.md.
house:
	$(PYTHON) docs/house.py
