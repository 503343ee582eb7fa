"""What ``tests/test_distributed.py`` runs in several processes: ``torchrun -m ... FOLDER``."""

import sys
from pathlib import Path

import numpy as np
import torch

import distributed
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from evaluation.retrieval import rank_interactions, retrieve
from tests.helpers import make_data, small_model
from tests.test_distributed import INTERACTIONS


def main(folder: Path) -> None:
    """Exchange some values, then rank the catalogue; each process writes what it got."""
    rank, size = distributed.rank(), distributed.size()
    distributed.join()
    distributed.join()  # has no effect
    assert distributed.total(10 + rank) == sum(10 + r for r in range(size))
    assert distributed.largest(-rank) == 0
    tensors = [torch.full((2, 3), float(rank)), torch.tensor(1.0)]
    distributed.add_up(tensors)
    assert tensors[0].tolist() == [[sum(range(size))] * 3] * 2 and tensors[1].item() == size
    whole = list(range(7))
    assert distributed.interleave(whole[rank::size]) == whole
    assert distributed.interleave([]) == []
    path = folder / "cached"
    with distributed.main_first():
        assert path.exists() == (rank > 0)
        path.touch()
    data, model = make_data([5, 4, 9, 3, 12, 7, 3]), small_model("lru").eval()
    loader = evaluation_loader(Histories(data, "test", 20), 2, 0)
    ranking = retrieve(model, loader, mask_history=True, num_candidates=10, description="")
    ranks, target_ranks = rank_interactions(model, loader, *INTERACTIONS, "")
    np.savez(folder / f"{rank}_of_{size}", *ranking, ranks, target_ranks)


if __name__ == "__main__":
    with distributed.joined():
        main(Path(sys.argv[1]))
    distributed.leave()  # as the scripts do
