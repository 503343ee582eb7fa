"""LLM4IDRec: data augmentation for ID-based recommenders with a language model.

A language model tuned on sequences of item numbers generates further interactions for each user.
They join the training data of unchanged recommenders (L. Chen et al., "Enhancing ID-based
Recommendation with Large Language Models", 2024, https://arxiv.org/abs/2411.02041).
"""
