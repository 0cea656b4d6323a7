"""The ops on GPUs, computed by Triton kernels."""
