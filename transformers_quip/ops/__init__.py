"""`torch.ops.quip.*`: the operations of quantized linears. Importing this registers them.

`schemas` defines their signatures and fakes, `reference` computes them with plain PyTorch on any device, `autograd`
differentiates them, `batching` maps them over a dimension, `graph` computes equal calls in compiled code once. A faster
version for a device (`cpu`, `triton`) is registered next to the reference and tested against it. `backend` lets the user
choose. `cpu.prepared` calls the CPU's version without the dispatcher.
"""

from __future__ import annotations

import torch

from . import autograd, backend, batching, bundle, graph, grouped, reference, schemas
from .cpu import bundle as cpu_bundle
from .cpu import prepared
from .cpu import run as cpu_run
from .layer import Layer
from .triton import grouped as triton_grouped
from .triton import run as triton_run

__all__ = ["Layer", "autograd", "backend", "prepared", "reference", "schemas"]

backend.read_environment()

# PyTorch keeps ops for the life of the process, even if this package is imported a second time.
if not hasattr(torch.ops.quip, "linear"):
    schemas.define()
    reference.register()
    bundle.register()
    grouped.register()
    cpu_run.register()
    cpu_bundle.register()
    autograd.register()
    batching.register()
    triton_run.register()
    triton_grouped.register()
    graph.register()
