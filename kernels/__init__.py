"""Hand-written Triton kernels, one family in each file."""
