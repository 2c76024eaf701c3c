"""Learnable direct partitioning: the trained quantizer of RCP, after Choi et al. 2025 (arXiv 2502.15779)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..formats import PackedWeight
from ..ops.kmeans_levels import kmeans_levels
from ..ops.quantize_weight import for_each_group, quantize_weight
from .fake_quantize import fake_quantize, group_range
from .group_quantizer import GroupQuantizer

__all__ = ["LearnableDirectPartitioning"]

_CLIP_INIT = 4.0  # sigmoid: 0.982 of the range
# Initial shares stay in this range. Nearer to 0 or 1 the gradient of a sigmoid vanishes.
_SHARE_MIN, _SHARE_MAX = 0.01, 0.99


class LearnableDirectPartitioning(GroupQuantizer):
    """Fake quantization of a weight to learned levels per group: a clipped range and its partition.

    Each group of ``group_size`` weights along K has four parameters, beta and gamma (clip), s1 and s2 (partition)::

        lo = sigmoid(beta) * min(w)       hi = max(sigmoid(gamma) * max(w), lo)
        p1 = sigmoid(s1)                  p2 = (1 - p1) * sigmoid(s2)
        levels = lo + (hi - lo) * {0, p1, p1 + p2, 1}

    Each weight gets the nearest level, with the values that docs/format.md would store. The form of the clip is
    published (OmniQuant's, as RCP uses it). The form of the partition is ours, because the equations of LDP are not
    public. With 3 and 4 bits the levels are evenly spaced between lo and hi.

    Gradients:

    - to the weight: 1 where lo < w < hi, else 0;
    - to the parameters: through the levels, with every weight keeping its level. Clipped weights therefore pull at lo
      or hi;
    - through min(w) and max(w): none. They would put a whole group's gradient on two weights (our choice).

    If all weights of a group are equal, they lie outside of lo and hi, since a sigmoid is below 1. They are stored as
    the nearer of the two and get no gradient. If they are all zero, the parameters get no gradient either.

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
        """Make a quantizer with uniform levels over sigmoid(4) = 0.982 of the range.

        Args:
            weight_shape: (N, K) = (out_features, in_features).
            bits: 2, 3 or 4.
            group_size: 32, 64, 128 or K.
            learn_clip: whether beta and gamma are parameters.
            learn_partition: whether s1 and s2 are parameters. None: yes with 2 bits.
            device: of the parameters.

        Raises:
            ValueError: bits, group_size or shape outside the format, or learn_partition with 3 or 4 bits.
        """
        super().__init__(weight_shape, bits, group_size)
        if learn_partition and bits != 2:
            raise ValueError(
                f"LearnableDirectPartitioning: learn_partition needs 2 bits, got {bits} bits; leave it out, levels of "
                f"3 and 4 bits are evenly spaced"
            )
        self._register("beta", _CLIP_INIT, learn_clip, device)
        self._register("gamma", _CLIP_INIT, learn_clip, device)
        if bits == 2:
            learned = learn_partition is None or learn_partition
            self._register("s1", -math.log(2.0), learned, device)
            self._register("s2", 0.0, learned, device)

    def _register(self, name: str, value: float, learned: bool, device: torch.device | str | None) -> None:
        values = torch.full(self._groups_shape, value, device=device)
        if learned:
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)

    @torch.no_grad()
    def init_uniform(self, weight: Tensor | None = None, clip: float = _CLIP_INIT) -> None:
        """Evenly spaced levels between ``sigmoid(clip)`` times the ends of each group's range.

        Args:
            weight: not used. The parameters do not depend on it.
            clip: value of beta and gamma.
        """
        self.beta.fill_(clip)
        self.gamma.fill_(clip)
        self._uniform_partition()

    @torch.no_grad()
    def init_clip_search(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """Evenly spaced levels over the best of 72 ranges by squared error (`rcp_kernels.ops.clip_search`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0: factor of each column's error, for example the diagonal of a Hessian.

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        ratios = self._clip_ratios(weight, importance)
        self.beta.copy_(torch.logit(ratios[..., 0]))
        self.gamma.copy_(torch.logit(ratios[..., 1]))
        self._uniform_partition()

    @torch.no_grad()
    def init_kmeans(self, weight: Tensor, importance: Tensor | None = None) -> None:
        """The k-means levels of each group, as closely as the parameters can give them (:meth:`init_levels`).

        Args:
            weight: floating point [N, K].
            importance: floating point [K], >= 0: factor of each column's error.

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        count = 2**self.bits
        levels = for_each_group(
            weight, self.group_size, lambda groups, share: kmeans_levels(groups, count, share), importance
        )
        self.init_levels(weight, levels)

    @torch.no_grad()
    def init_levels(self, weight: Tensor, levels: Tensor) -> None:
        """Set the parameters so that their levels equal or approach the given ones.

        Levels are reproduced up to rounding if the first level is 0.01 to 0.99 times the group's minimum, the last one
        0.01 to 0.99 times the maximum, and both inner shares, p1 and p2 / (1 - p1), lie in [0.01, 0.99]. Shares outside
        are clamped to these limits. With 3 and 4 bits only the first and the last level count.

        Args:
            weight: floating point [N, K].
            levels: floating point [N, groups, 2**bits], ascending.

        Raises:
            ValueError: weight or levels have another shape.
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
            # Rounding can put low + span above high; levels must ascend.
            inner = [torch.minimum(torch.addcmul(low, span, share), high) for share in (p1, p12)]
        else:
            last = 2**self.bits - 1
            inner = [torch.minimum(torch.add(low, span, alpha=k / last), high) for k in range(1, last)]
        return torch.stack([low, *inner, high], dim=-1)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as it would be stored, differentiable: the float32 values of ``export(weight).dequantize()``.

        Args:
            weight: floating point [N, K].
            dtype: of the result; the weight's by default. Under autocast, pass the compute dtype: this saves the
                linear layer a pass over the weight.

        Raises:
            ValueError: the weight has another shape.
        """
        self._check(weight)
        return fake_quantize(weight, self.levels(weight), self.group_size, dtype=dtype)

    @torch.no_grad()
    def export(self, weight: Tensor) -> PackedWeight:
        """The packed weight. ``export(w).dequantize().to(w.dtype)`` equals ``forward(w)`` bit for bit.

        Raises:
            ValueError: the weight has another shape, or the weight or the parameters have NaN or Inf.
        """
        self._check(weight)
        return quantize_weight(weight, self.bits, self.group_size, self.levels(weight))

    def _uniform_partition(self) -> None:
        if self.bits == 2:
            self.s1.fill_(-math.log(2.0))
            self.s2.zero_()


def _logit(part: Tensor, total: Tensor) -> Tensor:
    """logit(part / total), with the share clamped to [0.01, 0.99]; a share of 0.99 where total is 0."""
    share = torch.where(total != 0, part / total, _SHARE_MAX)
    return torch.logit(share.clamp(_SHARE_MIN, _SHARE_MAX))
