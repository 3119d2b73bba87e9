# Every target that needs an environment makes .venv first; nothing is installed outside it.
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test bench lint types reproduce reproduce-nano clean
help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/.ready: requirements/cpu.txt requirements/setup.sh pyproject.toml
	@bash requirements/setup.sh

setup: .venv/.ready  ## Make .venv (CPU: pinned versions; with an NVIDIA GPU: stock vLLM)

demo: .venv/.ready  ## Solve reasoning-gym problems with the embedded reasoner on vLLM under a hard budget
	@.venv/bin/ttc demo

lint: .venv/.ready  ## ruff: style and format
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

types: .venv/.ready  ## mypy --strict
	@$(PY) -m mypy

test: lint types  ## All tests, engines included
	@$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: .venv/.ready  ## Measure ttc against bare engines and peers, side by side
	@.venv/bin/ttc bench overhead
	@.venv/bin/ttc bench overhead --http
	@.venv/bin/ttc bench decode
	@$(PY) -m ttc.costmodel.intervals_study

reproduce: .venv/.ready  ## Every published figure, from its command
	@bash docs/reproduce.sh

reproduce-nano: .venv/.ready  ## Train, ship and measure the embedded reasoners and reward models from nothing (hours on 2 cores)
	@for size in xs s m l; do .venv/bin/ttc train reasoner --size $$size --ship && $(PY) -m ttc.rl.evaluate --model nano-$$size || exit 1; done
	@.venv/bin/ttc train reward --base nano-s --n 2500 --ship
	@$(PY) -m ttc.rl.family && $(PY) -m ttc.rl.family --speed && $(PY) -m ttc.rl.figures

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
