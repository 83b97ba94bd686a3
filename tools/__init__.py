"""Commands around training: weights in and out, plans, reports, benchmarks: `python -m tools.NAME`."""
