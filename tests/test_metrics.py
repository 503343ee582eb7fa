import numpy as np
import pytest

from metrics import ranking_metrics, split_metric, user_gains


def test_metrics_by_hand():
    metrics = ranking_metrics(np.array([1, 3, 11, 2]), ks=[1, 3, 10])
    assert metrics["num_users"] == 4
    assert metrics["Recall@1"] == metrics["MRR@1"] == metrics["NDCG@1"] == 1 / 4
    assert metrics["Recall@3"] == metrics["Recall@10"] == 3 / 4
    assert metrics["MRR@3"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4, abs=1e-15)
    assert metrics["NDCG@3"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(3)) / 4, abs=1e-15)


def test_gains_of_each_user():
    assert user_gains(np.array([1, 2, 4]), "MRR", 2).tolist() == [1, 0.5, 0]


def test_no_users():
    assert ranking_metrics(np.array([], dtype=np.int32), ks=[5]) == {
        "Recall@5": 0.0, "MRR@5": 0.0, "NDCG@5": 0.0, "num_users": 0,
    }  # fmt: skip


def test_split_metric():
    assert split_metric("NDCG@10") == ("NDCG", 10)
    for metric in ("NDCG", "NDCG@", "NDCG@0", "NDCG@010", "NDCG@1@2", "Accuracy@10", "NDCG@-1"):
        with pytest.raises(ValueError, match=r"use Recall, MRR or NDCG .* Recall@10"):
            split_metric(metric)


def test_equals_an_independent_library():
    import ir_measures
    import torch
    from ir_measures import RR, R, nDCG

    from evaluation.retrieval import target_ranks

    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(50.0), (200, 1)), axis=1)
    targets = rng.integers(50, size=200)
    ranks = target_ranks(torch.from_numpy(scores), torch.from_numpy(targets)).numpy()
    ours = ranking_metrics(ranks, ks=[1, 5, 10, 20])

    qrels = {str(user): {str(item): 1} for user, item in enumerate(targets)}
    run = {str(u): {str(i): float(s) for i, s in enumerate(row)} for u, row in enumerate(scores)}
    names = {"Recall": R, "MRR": RR, "NDCG": nDCG}
    measures = {f"{name}@{k}": m @ k for name, m in names.items() for k in (1, 5, 10, 20)}
    theirs = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    for name, measure in measures.items():
        assert ours[name] == pytest.approx(theirs[measure], abs=1e-12), name
