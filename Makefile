# make demo    prints a continuation that the bundled model samples
# make test    runs the tests, some minutes of them; PYTEST_ARGS="-k masks" for a part
# make test-slow  runs those that it leaves out: more layouts, sizes and repetitions
# make test-all  runs all of them
# make test-compat  runs the tests of make test, but for those marked any_version, and GPT-Neo-like scripts, with Python
#              3.10 or 3.11, TensorFlow 2.12 and mesh-tensorflow 0.1.18
# make test-gpt-neo GPT_NEO=path  runs the tests and main.py of a copy of GPT-Neo's repository there, with this library
#              and without, and compares them
# make fuzz    runs the property tests on random values; FUZZ_EXAMPLES=500 for so many of each test
# make check   looks the code over: ruff (rules and format), mypy (types), and that the documentation builds
# make docs    builds the documentation site in site/; a dead link or a docstring that does not parse is an error
# make coverage  runs all tests and lists the lines and branches of the package that they do not reach
# make notebook  makes examples/tour.ipynb of examples/tour.py, and runs it
# make bench   times the library beside its peers (benchmarks/README.md); ROWS="next-tf decode" for some rows
# make bench-tpu  what the sampling step costs on a TPU, by the estimate of the TPU's compiler, which needs no TPU
# make test-tpu  compiles each sampler for a TPU, without one: holds its cost against tests/data/tpu_costs.json, and the
#              tokens of the program in the TPU's own types against a CPU's
# make support  installs the package with each Python, TensorFlow and mesh-tensorflow and tests it, for hours
#              (docs/support.md); SUPPORT_ARGS="--python PATH --tensorflow 2.18" for some cells
# Each sets up what it needs in .venv, test-compat and test-gpt-neo in .venv-compat, bench in .venv-bench and, for rows
# that want other packages, .venv-bench-openvino and .venv-bench-onnx, bench-tpu and test-tpu in .venv-tpu, with python3
# and pip alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMPAT_VENV := $(VENV)-compat
BENCH_VENV := $(VENV)-bench
PEER_VENVS := $(BENCH_VENV)-openvino $(BENCH_VENV)-onnx
TPU_VENV := $(VENV)-tpu
FUZZ_EXAMPLES ?= 500
PROMPT ?= The family of Dashwood

.PHONY: demo check docs notebook test test-slow test-all test-compat test-gpt-neo test-tpu fuzz coverage bench bench-tpu support clean
.SECONDEXPANSION:
.DELETE_ON_ERROR:

demo: $(VENV)/demo.installed
	@$(BIN)/gpt-neo-sampling generate --prompt "$(PROMPT)" --temperature 0.7 --top-k 40 --max-new-tokens 96

check: $(VENV)/check.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MKDOCS) --site-dir build/site

# Not --quiet, which hides warnings from --strict too. Material has a banner about the future of MkDocs. ruff, of the extra
# `check`, formats the signatures.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
docs: $(VENV)/check.installed
	$(MKDOCS)
	@echo "site/index.html; for its search: $(BIN)/python -m http.server --directory site"

notebook: $(VENV)/test.installed
	@$(BIN)/python examples/make_tour.py

# A file's tests go to one process, which makes the file's fixtures once.
PYTEST := bin/python -m pytest -q -n 2 --dist loadfile -rs
test: MARKED = not slow
test-compat: MARKED = not slow and not any_version
test-slow: MARKED = slow
test-all: MARKED =
test test-slow test-all: $(VENV)/test.installed
test-compat: $(COMPAT_VENV)/compat.installed
test test-slow test-all test-compat:
	@$(<D)/bin/python -c 'import platform, importlib.metadata as m; print("Python", platform.python_version(), \
	  *(p + " " + m.version(p) for p in ("tensorflow", "mesh-tensorflow", "numpy")), sep=", ")'
	$(<D)/$(PYTEST) -m "$(MARKED)" $(PYTEST_ARGS)

test-gpt-neo: $(if $(GPT_NEO),$(COMPAT_VENV)/gpt-neo.installed)
	@$(if $(GPT_NEO),$(COMPAT_VENV)/bin/python tests/gpt_neo.py "$(GPT_NEO)" $(GPT_NEO_ARGS), \
	  echo "skipped: no copy of github.com/EleutherAI/gpt-neo is named; make test-gpt-neo GPT_NEO=path")

fuzz: $(VENV)/test.installed
	HYPOTHESIS_PROFILE=fuzz FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q -n 2 tests/sampling/test_properties.py \
	  $(PYTEST_ARGS)

coverage: $(VENV)/test.installed
	$(VENV)/$(PYTEST) --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

bench: $(BENCH_VENV)/bench.installed
	@$(BENCH_VENV)/bin/python benchmarks/run.py $(ROWS) $(BENCH_ARGS)

# The environments of rows that want other packages: run.py makes those that it needs. torchvision, which optimum-intel
# asks for, fails beside PyTorch's CPU build, and text needs none.
$(PEER_VENVS:%=%/peer.installed): $(BENCH_VENV)-%/peer.installed: benchmarks/requirements-%.txt | $$(@D)/bin/python
	@echo "installing $<" >&2
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $< >&2
	@$(@D)/bin/python -m pip uninstall -q -y torchvision >&2
	@touch $@

bench-tpu: $(TPU_VENV)/tpu.installed
	@$(TPU_VENV)/bin/python benchmarks/tpu.py $(BENCH_ARGS)

# A sampler's tests go to one process, which compiles its programs once.
test-tpu: $(TPU_VENV)/tpu.installed
	$(TPU_VENV)/bin/python -m pytest -q -n 2 --dist loadgroup -rs -m "not slow" tests/test_tpu.py $(PYTEST_ARGS)

support: $(VENV)/test.installed
	@$(BIN)/python benchmarks/support_table.py $(SUPPORT_ARGS)

clean:
	rm -rf $(VENV) $(COMPAT_VENV) $(BENCH_VENV) $(PEER_VENVS) $(TPU_VENV) build site *.egg-info

NEWEST := 13
$(COMPAT_VENV)/bin/python: NEWEST := 11
$(COMPAT_VENV)/bin/python: PYTHON = $(or $(firstword $(foreach p,python3.11 python3.10,$(shell $p -c 'print("$p")' \
  2>/dev/null))),python3)

# Where python3 comes without its venv module (Debian's does), virtualenv makes it.
$(patsubst %,%/bin/python,$(VENV) $(COMPAT_VENV) $(BENCH_VENV) $(PEER_VENVS) $(TPU_VENV)): %/bin/python:
	@echo "setting up $* with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, $(NEWEST)) and \
	  f"Python {v[0]}.{v[1]}: 3.10 to 3.$(NEWEST) is needed; run make PYTHON=python3.11, say")'
	@$(PYTHON) -m venv $* >/dev/null 2>&1 || { rm -rf $*; \
	  $(PYTHON) -m pip install -q --target $*-bootstrap virtualenv && \
	  PYTHONPATH=$*-bootstrap $(PYTHON) -m virtualenv -q $* && rm -rf $*-bootstrap; }

%.installed: pyproject.toml | $$(@D)/bin/python
	@echo "installing the package and what it needs (TensorFlow is large: some minutes)" >&2
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -e '.[$(subst demo,cli,$(*F))]' >&2
	@touch $@
