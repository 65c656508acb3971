# Each target is one check, run inside .venv/<version> of this checkout, which it makes if need be.
# ARGS go to the tool:  make test ARGS="-k pager -x"   PYTHONS="3.12" chooses interpreters.
# What they do is in tests/run.py.

PYTHON ?= python3
ARGS ?=
TARGETS := test lint types docs coverage bench mutations chaos interop check

.PHONY: help $(TARGETS) clean

help:
	@echo "sudo make test      the whole suite, on every Python from 3.11 that is found"
	@echo "     make check     style, types and the tests without a kernel: seconds"
	@echo "     make lint      ruff"
	@echo "     make types     mypy --strict"
	@echo "     make docs      the pages, into docs/_build"
	@echo "sudo make coverage  every branch of the floors that have no loop"
	@echo "sudo make mutations each law of the pager broken once, to see its test fail"
	@echo "sudo make chaos     a thousand kills of the server under load, nothing lost"
	@echo "sudo make bench     every figure that the project quotes"
	@echo "sudo make interop   programs that nobody here wrote, against us"
	@echo "     make clean     remove .venv, caches and what was built"

$(TARGETS):
	@$(PYTHON) -m tests.run $@ $(ARGS)

clean:
	rm -rf .venv build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
