# Everything starts here: `make demo` runs the example job, `make test` every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint pytest clean

demo: .venv/installed
	"$(BIN)/wagonway" run examples/job.yaml --stages 3
	"$(BIN)/wagonway" query --job complete-stdlib "select status, finish_reason, count(*) as n, round(avg(output_tokens), 1) as mean_tokens from results group by all order by n desc"

# The linters take one core for half a minute, in which the first tests mostly wait.
test: .venv/installed
	@$(MAKE) --no-print-directory --jobs=2 lint pytest

pytest: .venv/installed
	"$(BIN)/python" -m pytest

lint: .venv/installed
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

# The constraints pin the whole tree, so a set-up never depends on what an index offers today.
.venv/installed: pyproject.toml constraints.txt
	"$(PYTHON)" -m venv .venv
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt setuptools
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[stage,quantize,dense,milp,dev]"
	touch .venv/installed

clean:
	rm -rf .venv
