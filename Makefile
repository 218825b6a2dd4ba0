# Two commands: `make demo` runs the main job and says where its report is, `make test` checks everything.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs lock benchmark clean

demo: .venv/installed
	$(BIN)/python -m flashtrace_plugin.demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses 2 --dist loadfile

benchmark: .venv/installed
	$(BIN)/python benchmarks/flashtrace_speed.py

# torch comes first and with its own dependencies, so that a CUDA machine gets what it needs. The rest is a complete
# list and goes in without resolving: inseq and transformer-lens pin different versions of typeguard, which neither uses.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/site
	@echo "the site is in build/site, and needs no network: $(BIN)/python -m http.server --directory build/site --bind 127.0.0.1"

# Writes what is installed in .venv now, less torch and the packages that torch itself brings.
lock:
	$(BIN)/python -m pip list --format=freeze --exclude-editable \
		| grep -viE '^(torch|triton|nvidia-.*|cuda-.*|pip)==' > requirements.lock

clean:
	rm -rf .venv demo.html
