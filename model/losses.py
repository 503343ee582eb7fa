"""Cross-entropy over the catalogue without all its scores at once.

A retriever's ``forward`` hands its encodings (K, D), the item embeddings (V + 1, D) and the items'
biases (V + 1,) or None to its argument ``output``: ``torch.nn.functional.linear`` makes scores of
them, the functions here make a training loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Output = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Scores held at once: what a cache holds on the CPU, what memory can spare on a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
MIN_CHUNK_ROWS = 64
# A product in bfloat16 on the CPU compiles a kernel for every new number of rows, which takes as
# long as the product: rows of zeros fill up to a multiple of this.
KERNEL_ROWS = 16


class _LinearCrossEntropy(torch.autograd.Function):
    """Rows are taken in chunks. As the loss is a plain mean, the gradients of a chunk are known
    once its scores are, so they are computed in the forward pass and its scores forgotten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        precision: torch.dtype | None,
    ) -> Tensor:
        elements = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"])
        narrow = precision not in (None, x.dtype)
        padding = 0
        if narrow:
            elements *= 2  # every chunk costs a pass over the items' gradients besides
            padding = -len(x) % KERNEL_ROWS
        rows = max(MIN_CHUNK_ROWS, elements // len(weight) // KERNEL_ROWS * KERNEL_ROWS)
        rows = min(rows, len(x) + padding)
        # For all chunks, as fresh memory is slow to touch. What is multiplied may be narrower than
        # the softmax, which then has a buffer of its own.
        buffer = x.new_empty(rows, len(weight))
        products = torch.empty_like(buffer, dtype=precision) if narrow else buffer
        narrow_x = nn.functional.pad(x.to(products.dtype), (0, 0, 0, padding))
        narrow_weight = weight.to(products.dtype)
        target = 1 - label_smoothing
        loss = x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(narrow_x), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        totals = x.new_ones(len(narrow_x), 1)
        for part, grad_part, all_totals, label in zip(
            *(y.split(rows) for y in (narrow_x, grad_x, totals, labels[:, None]))
        ):
            product = products[: len(part)]  # (rows, V + 1)
            scores = torch.mm(part, narrow_weight.T, out=product)[: len(label)]
            if narrow:
                scores = buffer[: len(label)].copy_(scores)
            if bias is not None:
                scores += bias
            highest = scores.amax(1, keepdim=True)
            loss += (highest - target * scores.gather(1, label)).sum()
            grad = scores.sub_(highest).exp_()  # in place of the scores, as all that follows
            total = torch.sum(grad, 1, keepdim=True, out=all_totals[: len(label)])
            # The gradient of the scores is this over the totals. Dividing x instead saves a pass.
            grad.scatter_add_(1, label, -target * total)
            if grad_bias is not None:
                grad_bias += grad.T @ (1 / total[:, 0])
            if narrow:
                product[: len(label)] = grad
                grad_weight += product.T @ (part / all_totals).to(part.dtype)
            else:
                grad_weight.addmm_(product.T, part / total)
            torch.mm(product, narrow_weight, out=grad_part)
        loss += totals.log().sum()
        grad_x = (grad_x / totals)[: len(x)]
        if label_smoothing:  # of the target's mass, the same on every item: no score is needed
            spread = label_smoothing / len(weight)
            x_sum, weight_sum = x.sum(0), weight.sum(0)
            loss -= spread * (x_sum @ weight_sum)
            grad_x -= spread * weight_sum
            grad_weight -= spread * x_sum
            if bias is not None:
                loss -= spread * len(x) * bias.sum()
                grad_bias -= spread * len(x)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight, grad_bias = ctx.saved_tensors
        scale = grad_loss / len(grad_x)
        return (
            grad_x * scale,
            grad_weight * scale,
            None if grad_bias is None else grad_bias * scale,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    label_smoothing: float = 0.0,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Mean cross-entropy of ``x @ weight.T + bias`` that never holds all (K, V + 1) scores.

    Args:
        x: (K, D) encodings.
        weight: (V + 1, D) item embeddings.
        bias: (V + 1,) or None.
        labels: (K,) item ids.
        label_smoothing: share of the target that is spread over all items.
        precision: of the matrix products; the arguments' own if None. Softmax and sums over the
            rows keep theirs.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, labels, label_smoothing, precision)


class SampledCrossEntropy:
    """Mean cross-entropy over each label and negatives that all rows of a batch share.

    A negative j, drawn with probability q[j], stands for the catalogue's other items by importance
    sampling: its score is lowered by log(S q[j]), which makes the softmax's denominator right on
    average (Bengio and Senecal, Adaptive Importance Sampling, IEEE TNN 2008, equation 7, known as
    the logQ correction). A negative that is a row's label does not count for that row.

    Args:
        counts: (V + 1,) how often each item is a label in training; 0 for the start token.
        num_negatives: S, draws a batch, with replacement.
        device: where the loss is computed.
    """

    def __init__(
        self, counts: np.ndarray, num_negatives: int, device: torch.device | str = "cpu"
    ) -> None:
        # Half of the draws by frequency, half uniform over the items: popular items weigh most in
        # the denominator, and none may have a probability near 0, which would explode its score.
        items = np.arange(len(counts)) > 0
        q = 0.5 * counts / counts.sum() + 0.5 * items / items.sum()
        self.num_negatives = num_negatives
        self.cumulative = torch.from_numpy(np.cumsum(q / q.sum())).to(device)
        with np.errstate(divide="ignore"):  # the start token is never drawn
            self.correction = torch.from_numpy(np.log(num_negatives * q)).float().to(device)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        labels: Tensor,
        label_smoothing: float = 0.0,
        precision: torch.dtype | None = None,
    ) -> Tensor:
        """Scalar loss; arguments as of ``linear_cross_entropy``."""
        draws = torch.rand(
            self.num_negatives, dtype=self.cumulative.dtype, device=self.cumulative.device
        )
        negatives = torch.searchsorted(self.cumulative, draws, right=True)
        negatives = negatives.clamp_(max=len(weight) - 1)  # the last sum may fall short of 1
        positives, others = weight[labels], weight[negatives]
        label_scores = (x * positives).sum(1)  # (K,)
        offsets = -self.correction[negatives]  # (S,)
        if bias is not None:
            label_scores = label_scores + bias[labels]
            offsets = offsets + bias[negatives]
        factors = x, others
        if precision is not None:
            factors = x.to(precision), others.to(precision)
        scores = factors[0] @ factors[1].T + offsets  # (K, S)
        scores = scores.masked_fill(labels[:, None] == negatives, -torch.inf)
        total = torch.logaddexp(label_scores, scores.logsumexp(1))
        target_scores = label_scores
        if label_smoothing:  # a mean of scores needs no sampling
            mean_scores = x @ weight[1:].mean(0)
            if bias is not None:
                mean_scores = mean_scores + bias[1:].mean()
            target_scores = torch.lerp(label_scores, mean_scores, label_smoothing)
        return (total - target_scores).mean()
