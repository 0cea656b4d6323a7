"""Checkpoints of other packages: their tensors are re-packed into native ones without loss."""
