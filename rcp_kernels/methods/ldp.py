"""Learnable direct partitioning: the trained quantizer of RCP, after Choi et al. 2025 (arXiv 2502.15779)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import PackedWeight, check_bits, check_group_size, num_groups
from ..ops.clip_search import clip_search
from ..ops.kmeans_levels import kmeans_levels
from ..ops.quantize_weight import quantize_weight
from .fake_quantize import fake_quantize, group_range
from .level_search import for_each_group

__all__ = ["LearnableDirectPartitioning"]

_CLIP_INIT = 4.0  # sigmoid: 0.982 of the range
# Shares that initial parameters stay between: nearer to 0 or 1 a sigmoid hardly moves any more.
_SHARE_MIN, _SHARE_MAX = 0.01, 0.99


class LearnableDirectPartitioning(nn.Module):
    """Fake quantization of a weight to levels that are learned per group: a clipped range and its partition.

    For each group of ``group_size`` weights along K, with four numbers beta, gamma (clip) and s1, s2 (partition)::

        lo = sigmoid(beta) * min(w)       hi = max(sigmoid(gamma) * max(w), lo)
        p1 = sigmoid(s1)                  p2 = (1 - p1) * sigmoid(s2)
        levels = lo + (hi - lo) * {0, p1, p1 + p2, 1}

    and each weight gets the nearest level, as docs/format.md would store it. The form of the clip is published
    (OmniQuant's, as used by RCP); that of the partition is ours: the equations of LDP are not public. With 3 and 4 bits
    the levels are evenly spaced between lo and hi.

    Gradients: to the weight 1 where lo < w < hi and else 0; to the parameters through the levels, each weight keeping
    its level (clipped weights so pull at lo or hi); none through min(w) and max(w), which would put a whole group's
    gradient onto two weights (ours). Weights that are all equal lie outside of lo and hi, since a sigmoid is below 1:
    they are stored as the nearer of the two and get no gradient; where they are zero, the parameters get none either.

    Attributes:
        beta, gamma, s1, s2: float32 [N, ceil(K / group_size)]; parameters if learned, else buffers. s1 and s2 exist
            with 2 bits only.
        bits: 2, 3 or 4.
        group_size: weights along K that share a table.
        weight_shape: (N, K).
    """

    beta: Tensor
    gamma: Tensor
    s1: Tensor
    s2: Tensor

    def __init__(
        self,
        weight_shape: Sequence[int],
        bits: int = 2,
        group_size: int = 128,
        learn_clip: bool = True,
        learn_partition: bool | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the quantizer of uniform levels over sigmoid(4) = 0.982 of the range.

        Args:
            weight_shape: (N, K) = (out_features, in_features).
            bits: 2, 3 or 4.
            group_size: 32, 64, 128 or K.
            learn_clip: whether beta and gamma are parameters.
            learn_partition: whether s1 and s2 are; None for where there are any, with 2 bits.
            device: of the parameters.

        Raises:
            ValueError: bits, group_size or shape outside the format, or a learned partition of 3 or 4 bits.
        """
        super().__init__()
        if len(weight_shape) != 2 or min(weight_shape) < 1:
            raise ValueError(
                f"LearnableDirectPartitioning: weight_shape must be (out_features, in_features), both at least 1, got "
                f"{tuple(weight_shape)}; pass weight.shape"
            )
        self.weight_shape = (int(weight_shape[0]), int(weight_shape[1]))
        self.bits = check_bits(bits)
        self.group_size = check_group_size(group_size, self.weight_shape[1])
        if learn_partition and bits != 2:
            raise ValueError(
                f"LearnableDirectPartitioning: learn_partition needs 2 bits, whose 3 intervals s1 and s2 describe, got "
                f"{bits} bits; leave it out, the levels are then evenly spaced"
            )
        shape = (self.weight_shape[0], num_groups(self.weight_shape[1], group_size))
        self._register("beta", torch.full(shape, _CLIP_INIT, device=device), learn_clip)
        self._register("gamma", torch.full(shape, _CLIP_INIT, device=device), learn_clip)
        if bits == 2:
            learned = learn_partition is None or learn_partition
            self._register("s1", torch.full(shape, -math.log(2.0), device=device), learned)
            self._register("s2", torch.zeros(shape, device=device), learned)

    def _register(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @torch.no_grad()
    def init_uniform(self, weight: Tensor | None = None, clip: float = _CLIP_INIT) -> None:
        """Evenly spaced levels between ``sigmoid(clip)`` times the ends of each group's range.

        Args:
            weight: not needed: the parameters do not depend on it.
            clip: beta and gamma.
        """
        self.beta.fill_(clip)
        self.gamma.fill_(clip)
        self._uniform_partition()

    @torch.no_grad()
    def init_clip_search(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Evenly spaced levels over the range of least squared error, of 72 tried (`rcp_kernels.ops.clip_search`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0: counts the error of each column; the diagonal of a Hessian, say.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        count = 2**self.bits
        ratios = for_each_group(
            weight, self.group_size, lambda groups, share: clip_search(groups, count, share), importance
        )
        self.beta.copy_(torch.logit(ratios[..., 0]))
        self.gamma.copy_(torch.logit(ratios[..., 1]))
        self._uniform_partition()

    @torch.no_grad()
    def init_kmeans(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """The k-means levels of each group, as near as the parameters come (:meth:`init_levels`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0, of each column's error.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        count = 2**self.bits
        levels = for_each_group(
            weight, self.group_size, lambda groups, share: kmeans_levels(groups, count, share), importance
        )
        self.init_levels(weight, levels)

    @torch.no_grad()
    def init_levels(self, weight: Tensor, levels: Tensor) -> None:
        """The parameters whose levels are these, or come near them.

        Exact, but for rounding, where the first level is 0.01 to 0.99 times the group's minimum, the last one so much
        of the maximum, and no interval is below a hundredth of the range (of what p1 leaves, for p2); what lies outside
        is moved there. With 3 and 4 bits only the first and the last level are kept.

        Args:
            weight: floating point [N, K].
            levels: floating point [N, groups, 2**bits], ascending.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        shape = (*self.beta.shape, 2**self.bits)
        if tuple(levels.shape) != shape:
            raise ValueError(
                f"LearnableDirectPartitioning: levels must be [out_features, groups, 2**bits] = {shape}, got "
                f"{tuple(levels.shape)}; expand a shared table to every group"
            )
        low, high = group_range(weight, self.group_size)
        levels = levels.to(low)
        self.beta.copy_(_logit(levels[..., 0], low))
        self.gamma.copy_(_logit(levels[..., -1], high))
        self._uniform_partition()
        if self.bits == 2:
            low = torch.sigmoid(self.beta) * low
            span = torch.sigmoid(self.gamma) * high - low
            inside = span > 0
            s1 = _logit(levels[..., 1] - low, span)
            p1 = torch.sigmoid(s1)
            s2 = _logit(levels[..., 2] - low - span * p1, span * (1 - p1))
            self.s1.copy_(torch.where(inside, s1, self.s1))
            self.s2.copy_(torch.where(inside, s2, self.s2))

    def levels(self, weight: Tensor) -> Tensor:
        """The levels before they are snapped, differentiable in the parameters: float32 [N, groups, 2**bits].

        Args:
            weight: floating point [N, K].
        """
        low, high = group_range(weight, self.group_size)
        low = torch.sigmoid(self.beta) * low
        high = torch.maximum(torch.sigmoid(self.gamma) * high, low)
        span = high - low
        if self.bits == 2:
            p1 = torch.sigmoid(self.s1)
            p12 = p1 + (1 - p1) * torch.sigmoid(self.s2)
            # Not above hi, which low + span may exceed by a rounding.
            inner = [torch.minimum(torch.addcmul(low, span, share), high) for share in (p1, p12)]
        else:
            last = 2**self.bits - 1
            inner = [torch.minimum(torch.add(low, span, alpha=k / last), high) for k in range(1, last)]
        return torch.stack([low, *inner, high], dim=-1)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it would be stored, differentiable: the float32 values of ``export(weight).dequantize()``.

        Args:
            weight: floating point [N, K].
            dtype: of the result; that of weight by default. Under autocast, asking for the compute dtype here saves
                the linear layer a pass over the weight.

        Raises:
            ValueError: another shape.
        """
        self._check(weight)
        return fake_quantize(weight, self.levels(weight), self.group_size, dtype=dtype)

    @torch.no_grad()
    def export(self, weight: Tensor) -> PackedWeight:
        """The packed weight; ``export(w).dequantize().to(w.dtype)`` equals ``forward(w)`` bit for bit.

        Raises:
            ValueError: another shape, or NaN or Inf in the weight or the parameters.
        """
        self._check(weight)
        return quantize_weight(weight, self.bits, self.group_size, self.levels(weight))

    def extra_repr(self) -> str:
        return f"weight_shape={self.weight_shape}, bits={self.bits}, group_size={self.group_size}"

    def _uniform_partition(self) -> None:
        if self.bits == 2:
            self.s1.fill_(-math.log(2.0))
            self.s2.zero_()

    def _check(self, weight: Tensor) -> None:
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(
                f"LearnableDirectPartitioning: weight must have the shape {self.weight_shape} that the quantizer was "
                f"made for, got {tuple(weight.shape)}; make one with weight.shape"
            )


def _logit(part: Tensor, whole: Tensor) -> Tensor:
    """logit(part / whole), of a share held in [0.01, 0.99]; 0.99 where whole is 0."""
    share = torch.where(whole != 0, part / whole, _SHARE_MAX)
    return torch.logit(share.clamp(_SHARE_MIN, _SHARE_MAX))
