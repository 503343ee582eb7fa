"""Evaluation of trained models: one inference loop, retrieval metrics, reranking."""
