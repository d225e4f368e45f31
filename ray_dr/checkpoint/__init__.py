"""Checkpoints: what each rank saves and reads (pure plans), and the pipelines that move the bytes."""
