"""LLM4IDRec: interactions that a language model writes, to train unchanged recommenders on.

L. Chen et al., Enhancing ID-based Recommendation with Large Language Models, 2024
(https://arxiv.org/abs/2411.02041).
"""
