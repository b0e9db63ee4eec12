# make venv | demo | app | notebook | test | test-slow | test-dassl DASSL=PATH | reproduce DATA=PATH | benchmark | format | clean
.POSIX:
.PHONY: venv demo app notebook test test-slow test-dassl reproduce benchmark format clean

BIN = .venv/bin
MINI = "MiniDigits,MiniLetters,MiniSymbols,MiniShapes"
CLEAN = OUT= DATA= IMAGES= FEATURES= CACHE= LAUNCHER= PYTHON=$(BIN)/python
# PYTHON=/path/to/python names a Python of 3.11 to 3.13; LOCK= takes the newest versions that
# requirements*.txt allow, instead of those that were tested together.
LOCK = -c requirements.lock
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK)
# Present only after an installation that ran to its end; one that was interrupted starts anew.
COMPLETE = .venv/.complete
# The same with what tests, style and the notebook need beside it.
DEVELOP = .venv/.complete-dev
# The same with what the app needs.
GRADIO = .venv/.complete-app
RAY = .venv/.complete-ray

venv: $(COMPLETE)

$(COMPLETE): requirements.txt requirements.lock
	@test ! -L .venv || { echo "error: .venv is a link, and what it leads to is not this clone's to replace; remove the link" >&2; exit 2; }
	@test -f $(COMPLETE) || rm -rf .venv
	@rm -f $(COMPLETE)
	@wanted="$(PYTHON)"; for python in $${wanted:-python3.11 python3.12 python3.13 python3 python}; do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
			found=$$python; break; fi; done; \
	if test -z "$$found"; then \
		echo "error: $${wanted:-what is on the PATH} is no Python of 3.11 to 3.13; make PYTHON=/path/to/python" >&2; \
		exit 2; fi; \
	echo "making .venv with $$found (torch is large: minutes on a first installation)"; \
	$$found -m venv .venv
	$(PIP) -r requirements.txt
	@touch $(COMPLETE)

$(DEVELOP): $(COMPLETE) requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $(DEVELOP)

$(GRADIO): $(COMPLETE) requirements-app.txt
	$(PIP) -r requirements-app.txt
	@touch $(GRADIO)

$(RAY): $(COMPLETE) requirements-ray.txt
	$(PIP) -r requirements-ray.txt
	@touch $(RAY)

# What the environment says to forget_clip.sh does not hold here: the steps belong together.
demo: $(COMPLETE)
	$(CLEAN) TRAINER=ForgetLoRA sh forget_clip.sh 1 0 $(MINI) mini 0
	$(CLEAN) TRAINER=ForgetExact sh forget_clip.sh 2 0 $(MINI) mini 0
	$(BIN)/python utils.py paper=results/results1/seed_0 exact=results/results2/seed_0 --draw results/demo.png
	$(BIN)/python -m evaluation.audit results/results1/seed_0 results/results2/seed_0
	$(BIN)/python -m evaluation.report results
	$(BIN)/python -m experiments hide --draw results/search.png
	@echo "open results/report.html in a browser"

# OPTIONS are those of app.py, such as OPTIONS='--model hf:DIR --images FOLDER'.
app: $(GRADIO)
	$(BIN)/python app.py $(OPTIONS)

notebook: $(DEVELOP)
	$(BIN)/jupyter execute --inplace forget.ipynb
	@if test -f results/results1/seed_0/logs.json && test -f results/results2/seed_0/logs.json; then \
		$(BIN)/jupyter execute --inplace results.ipynb; \
	else echo "results.ipynb was not run: it shows the results of make demo"; fi

test: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(DEVELOP)
	$(BIN)/python -m pytest -m slow

# The real Dassl (github.com/KaiyangZhou/Dassl.pytorch, on no package index; DASSL is a checkout) in
# an environment of its own: its requirements with the pins of 2019 lifted and its linters left out;
# wilds without its dependencies, since it would bring a torch of its own choice.
test-dassl:
	@test -n "$(DASSL)" || { echo "error: make test-dassl DASSL=path of a checkout of Dassl.pytorch" >&2; exit 2; }
	@test -f "$(DASSL)/dassl/__init__.py" || { echo "error: no package dassl in '$(DASSL)'; DASSL is the path of a checkout of Dassl.pytorch" >&2; exit 2; }
	@$(MAKE) --no-print-directory .venv-dassl/.complete
	dassl=$$(cd "$(DASSL)" && pwd) && \
	CLIP_FORGET_ENGINE=dassl OUTDATED_IGNORE=1 PYTHON="$$PWD/.venv-dassl/bin/python" PYTHONPATH="$$dassl" \
	.venv-dassl/bin/python -m pytest tests/test_engine.py tests/test_end_to_end.py

.venv-dassl/.complete: requirements.txt requirements-dev.txt
	rm -rf .venv-dassl
	$${PYTHON:-python3.11} -m venv .venv-dassl
	.venv-dassl/bin/python -m pip install --quiet --disable-pip-version-check $(LOCK) -r requirements-dev.txt \
		gdown tensorboard future tabulate ogb outdated pytz littleutils
	.venv-dassl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps wilds==1.2.2
	touch $@

# The paper's experiments on images of your own, its numbers beside the measured ones; OPTIONS are
# those of `python -m experiments reproduce`. A run that was killed goes on when it is started again.
reproduce:
	@test -n "$(DATA)" || { echo "error: make reproduce DATA=path of the image sets (DATASETS.md) [OUT=results] [CACHE=cache] [OPTIONS='--weights RN50=RN50.pt']" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(COMPLETE)
	out="$(OUT)" cache="$(CACHE)"; \
	$(BIN)/python -m experiments reproduce --data "$(DATA)" --out "$${out:-results}" --cache "$${cache:-cache}" $(OPTIONS)

benchmark: $(COMPLETE)
	$(BIN)/python -m benchmarks driver
	$(BIN)/python -m benchmarks solver

format: $(DEVELOP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-dassl
