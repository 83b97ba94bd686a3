"""Evaluations of frozen features, and pictures of them. Run one as `python -m evals.NAME`."""
