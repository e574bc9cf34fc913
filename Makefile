# make demo   prints a continuation that the bundled model samples
# make test   runs the whole test suite
# Each sets up what it needs in .venv, with python3 and pip alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= The family of Dashwood

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed
	@$(BIN)/gpt-neo-sampling generate --prompt "$(PROMPT)" --temperature 0.7 --top-k 40 --max-new-tokens 96

test: $(VENV)/test.installed
	$(BIN)/python -m pytest -q -n 2 $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build *.egg-info

# Where python3 comes without its venv module (Debian's does), virtualenv makes it.
$(BIN)/python:
	@echo "setting up $(VENV) with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and \
	  f"Python {v[0]}.{v[1]}: 3.10 to 3.13 is needed; run make PYTHON=python3.12, say")'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install -q --target $(VENV)-bootstrap virtualenv && \
	  PYTHONPATH=$(VENV)-bootstrap $(PYTHON) -m virtualenv -q $(VENV) && rm -rf $(VENV)-bootstrap; }

$(VENV)/%.installed: pyproject.toml | $(BIN)/python
	@echo "installing the package and what it needs (TensorFlow is large: some minutes)" >&2
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[$(subst demo,cli,$*)]' >&2
	@touch $@
