"""The modules that take the place of dense linears and embeddings."""

from .embedding import QuipEmbedding
from .linear import QuipLinear

__all__ = ["QuipEmbedding", "QuipLinear"]
