"""Fast kernels of transformers-quip: the ground floor, which knows tensors and nothing else of the project."""
