"""Everything that hooks into Transformers, and nothing else."""
