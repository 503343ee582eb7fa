"""Batches for both stages, made when they are needed."""
