# One word for each chore; CONTRIBUTING.md says more about them.
.PHONY: check test docs conformance versions gpu

check:
	python -m tests

test:
	OMP_NUM_THREADS=1 python -m pytest -n 2

docs:
	python -m mkdocs build --strict

conformance:
	python -m tests.conformance

versions:
	python -m tests.versions oldest
	python -m tests.versions newest

gpu:
	benchmarks/gpu.sh
