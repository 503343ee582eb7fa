"""Cross-entropy over the catalogue that never holds all scores at once.

A retriever gives encodings x (K, D), item embeddings W (V + 1, D) and optional biases (V + 1,).
The scores x W^T + bias would be the largest tensor of a training step, so the losses here compute
them in chunks, or only those of sampled items.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.base import Retriever

# Scores held at once: as many as fit in the cache of a CPU, or in the memory of a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
MIN_CHUNK_ROWS = 64
# On the CPU, oneDNN compiles a kernel for every new number of rows of a bfloat16 product, which
# takes as long as the product. Rows are padded with zeros to a multiple of this.
KERNEL_ROWS = 16


class CatalogueLoss(Protocol):
    """A training loss over the catalogue; see ``linear_cross_entropy`` for the arguments."""

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
        """Compute the mean loss over the rows of ``x``."""
        ...


class _Plan(NamedTuple):
    """How the rows of ``x`` are cut into chunks."""

    rows: int  # per chunk
    padding: int  # rows of zeros after the last one
    dtype: torch.dtype  # of the products
    is_narrow: bool  # whether that differs from the dtype of x


def _plan(x: Tensor, num_items: int, precision: torch.dtype | None) -> _Plan:
    dtype = precision or x.dtype
    is_narrow = dtype != x.dtype
    elements = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"])
    padding = 0
    if is_narrow:
        elements *= 2  # each chunk also costs a pass over the gradients of W
        padding = -len(x) % KERNEL_ROWS
    rows = max(MIN_CHUNK_ROWS, elements // num_items // KERNEL_ROWS * KERNEL_ROWS)
    return _Plan(min(rows, len(x) + padding), padding, dtype, is_narrow)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, with its gradients computed in the forward pass.

    For one row x with scores s = W x + b and label y, let m = max(s), E = exp(s - m), Z = sum(E).
    With label smoothing e, the target distribution is q = (1 - e) onehot(y) + e / (V + 1), and

        loss    = m + log Z - (1 - e) s_y - e mean(s)
        dloss/ds = E / Z - q

    As the loss is a plain mean over rows, these gradients are final once a row's scores are known:
    a chunk's scores are turned into gradients in place and then overwritten by the next chunk's.
    The narrow operands are divided by Z instead of the scores, dx = (E - Z q) W / Z and
    dW = (E - Z q)^T (x / Z), which saves a pass over the scores. The part e / (V + 1) of q is the
    same for all items, so its share of loss and gradients needs only the sums of x and W over their
    rows.
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
        """Compute the mean loss; see ``linear_cross_entropy``."""
        plan = _plan(x, len(weight), precision)
        # One buffer for all chunks, as fresh memory is slow to touch. Products of another dtype
        # than the softmax have a buffer of their own.
        buffer = x.new_empty(plan.rows, len(weight))
        products = torch.empty_like(buffer, dtype=plan.dtype) if plan.is_narrow else buffer
        narrow_x = nn.functional.pad(x.to(plan.dtype), (0, 0, 0, plan.padding))
        narrow_weight = weight.to(plan.dtype)
        hit = 1 - label_smoothing
        loss = x.new_zeros(())
        grad_x, grad_weight = torch.empty_like(narrow_x), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        totals = x.new_ones(len(narrow_x), 1)  # Z, and 1 for rows of padding
        for part, grad_part, padded_totals, label in zip(
            *(y.split(plan.rows) for y in (narrow_x, grad_x, totals, labels[:, None]))
        ):
            product = products[: len(part)]  # (rows, V + 1)
            scores = torch.mm(part, narrow_weight.T, out=product)[: len(label)]
            if plan.is_narrow:
                scores = buffer[: len(label)].copy_(scores)
            if bias is not None:
                scores += bias
            highest = scores.amax(1, keepdim=True)
            loss += (highest - hit * scores.gather(1, label)).sum()
            grad = scores.sub_(highest).exp_()  # in place, as is all that follows
            total = torch.sum(grad, 1, keepdim=True, out=padded_totals[: len(label)])
            grad.scatter_add_(1, label, -hit * total)
            if grad_bias is not None:
                grad_bias += grad.T @ (1 / total[:, 0])
            if plan.is_narrow:
                product[: len(label)] = grad
                grad_weight += product.T @ (part / padded_totals).to(part.dtype)
            else:
                grad_weight.addmm_(product.T, part / total)
            torch.mm(product, narrow_weight, out=grad_part)
        loss += totals.log().sum()
        grad_x = (grad_x / totals)[: len(x)]
        if label_smoothing:
            spread = label_smoothing / len(weight)
            x_sum, weight_sum = x.sum(0), weight.sum(0)
            loss -= spread * (x_sum @ weight_sum)
            grad_x -= spread * weight_sum
            grad_weight -= spread * x_sum
            if bias is not None and grad_bias is not None:
                loss -= spread * len(x) * bias.sum()
                grad_bias -= spread * len(x)
        ctx.save_for_backward(grad_x, grad_weight, grad_bias)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients of the forward pass."""
        (grad_loss,) = grad_outputs
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
    """Compute the mean cross-entropy of ``x @ weight.T + bias`` without all (K, V + 1) scores.

    Args:
        x: (K, D) encodings.
        weight: (V + 1, D) item embeddings.
        bias: (V + 1,) or None.
        labels: (K,) item ids.
        label_smoothing: share of the target probability that is spread over all items.
        precision: dtype of the matrix products, by default that of the arguments. The softmax and
            sums over rows are computed in the dtype of the arguments.

    Returns:
        Scalar loss.
    """
    return _LinearCrossEntropy.apply(x, weight, bias, labels, label_smoothing, precision)


def catalogue_loss(
    model: Retriever, batch: dict[str, Any], cross_entropy: CatalogueLoss = linear_cross_entropy
) -> Tensor:
    """Compute the mean loss of a retriever on a training batch.

    Args:
        model: the retriever.
        batch: ``sequences``, a ``JaggedBatch``, and ``labels`` (K,), the items to predict.
        cross_entropy: one of the losses of this module.

    Returns:
        Scalar loss.
    """
    encodings = model.encode(batch["sequences"])
    return cross_entropy(encodings, model.item_embeddings, model.item_bias, labels=batch["labels"])


class SampledCrossEntropy:
    """Mean cross-entropy over each label and negatives that all rows of a batch share.

    A negative j, drawn with probability q[j], represents the rest of the catalogue by importance
    sampling. Its score is lowered by log(S q[j]), which makes the softmax's denominator unbiased
    (Bengio and Senecal, Adaptive Importance Sampling, IEEE TNN 2008, equation 7, known as the logQ
    correction). A negative that is the label of a row is ignored in that row.

    Args:
        counts: (V + 1,) how often each item is a label in training; 0 for the start token.
        num_negatives: S, draws per batch, with replacement.
        device: device of the loss.
    """

    def __init__(
        self, counts: np.ndarray, num_negatives: int, device: torch.device | str = "cpu"
    ) -> None:
        # Half of the draws by frequency, half uniform: popular items weigh most in the
        # denominator, and no item may have a probability near 0, which would explode its score.
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
        """Compute the mean loss; see ``linear_cross_entropy`` for the arguments."""
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
        if label_smoothing:  # the mean score of the catalogue is exact, without sampling
            mean_scores = x @ weight[1:].mean(0)
            if bias is not None:
                mean_scores = mean_scores + bias[1:].mean()
            target_scores = torch.lerp(label_scores, mean_scores, label_smoothing)
        return (total - target_scores).mean()
