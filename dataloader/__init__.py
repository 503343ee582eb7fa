"""Batches of both stages, assembled on demand."""
