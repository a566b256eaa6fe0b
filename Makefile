# `make demo` and `make test` do their own set-up; a second run starts in seconds.
# PYTHON=python3.12 make …   another interpreter       EXTRAS=sample make demo   a lighter install
PYTHON ?= python3
EXTRAS ?= dev
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed-$(EXTRAS)
APT    := libportaudio2 pulseaudio pulseaudio-utils libasound2-plugins espeak-ng sox

.PHONY: demo test test-slow check docs docs-check format rooms setup system clean help
help:
	@echo "make demo   real Gemma 3 270M, offline, inside a planned budget"
	@echo "make test   the test suite"

demo: $(STAMP)
	@$(VENV)/bin/edge-gemma demo

# A file's tests stay on one core: they share what is dear to make.
test: system $(STAMP)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile

test-slow: system $(STAMP)
	$(PY) -m pytest -m slow

# What a reviewer would ask a machine: format, lint, types. mypy wants the package as it is installed, so it gets a tree of links.
TREE := .cache/typed
check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@rm -rf $(TREE) && mkdir -p $(TREE)/edge_gemma
	@for f in edge_gemma/* convert benchmarks device_profiles; do ln -s "$(CURDIR)/$$f" $(TREE)/edge_gemma/; done
	cd $(TREE) && "$(CURDIR)/$(PY)" -m mypy --config-file "$(CURDIR)/pyproject.toml" --cache-dir "$(CURDIR)/.cache/mypy"
	$(PY) -m edge_gemma.benchmarks.dev.doc_tables --check
	$(PY) tests/compatibility.py --check

# The tables of docs/*.md out of docs/data/*.json; `make docs-check` says which pages are stale.
docs: $(STAMP)
	$(PY) -m edge_gemma.benchmarks.dev.doc_tables
	$(PY) tests/compatibility.py

docs-check: $(STAMP)
	$(PY) -m edge_gemma.benchmarks.dev.doc_tables --check
	$(PY) tests/compatibility.py --check

# The packages floor by floor, out of their imports; tests/test_rooms.py holds the arrows.
rooms:
	@$(PYTHON) tests/rooms.py

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

setup: $(STAMP)

# System libraries that only audio needs: installed where we may, else the line to type. Never fatal: text needs none of them.
system:
	@missing=""; for p in $(APT); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if ! command -v apt-get >/dev/null; then echo "no apt here; audio tests skip unless you install the likes of:$$missing"; \
	  elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null || echo "apt failed; audio tests will skip"; \
	  elif sudo -n true 2>/dev/null; then sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null || echo "apt failed; audio tests will skip"; \
	  else echo "audio tests need system libraries. Type:  sudo apt-get install --no-install-recommends$$missing"; fi; fi

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Try PYTHON=python3.12 make"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "A C++ compiler is needed to build llama.cpp. Type:  sudo apt-get install build-essential"; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { echo "Type:  sudo apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV); llama.cpp is compiled once (3 to 10 minutes on a small machine), then cached by pip"
	@$(PY) -m pip install --disable-pip-version-check -v "$$(sed -n 's/.*"\(llama-cpp-python[^"]*\)".*/\1/p' pyproject.toml)" > $(VENV)/build.log 2>&1 & pid=$$!; \
	 while kill -0 $$pid 2>/dev/null; do sleep 1; line=$$(grep -aoE '^ *\[[0-9]+/[0-9]+\]' $(VENV)/build.log 2>/dev/null | tail -1); \
	   if [ -t 1 ]; then printf '\r  compiling llama.cpp %s   ' "$$line"; elif [ "$$line" != "$$last" ] && [ $$((n=n+1)) -ge 30 ]; then n=0; echo "  compiling llama.cpp $$line"; last=$$line; fi; done; \
	 wait $$pid || { echo; echo "llama-cpp-python did not install; the end of $(VENV)/build.log:"; tail -25 $(VENV)/build.log; exit 1; }; echo
	@$(PY) -m pip install --disable-pip-version-check -q -e '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) .cache
