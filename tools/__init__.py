"""Commands around training: weights in and out, plans, reports, benchmarks. Run one as `python -m tools.NAME`."""
