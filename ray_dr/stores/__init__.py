"""Stores: names -> bytes. The object-store client lives here and nowhere else."""
