"""The orthogonal transform that makes activations, and the weights that take them, easier to quantize."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_one_of
from ..ops.lut_linear import NO_ROTATION, Rotation
from ..ops.walsh_matrices import factor_size, hadamard_matrix, walsh_matrix
from ..ops.walsh_transform import transform_tables, walsh_transform, walsh_transform_reference

__all__ = ["OnlineRotation", "check_input_rotation", "rotate_inputs"]

# The index is the number in `state`.
_ORDERS = ("natural", "sequency")
_VERSION = 1


class OnlineRotation(nn.Module):
    """``y = R x`` for each token x, with R an orthogonal matrix of +-1/sqrt(n), applied by a fast Walsh transform.

    The rotation spreads the outliers of a token over all its entries, and those of a weight over its columns. It runs
    in the model where no weight can absorb it: R3 on queries and keys after RoPE, R4 before down_proj, and across heads
    before o_proj (QuaRot, Ashkboos et al. 2024, and RCP, arXiv 2502.15779). :meth:`fuse_into` folds it into the weight
    before or after. Blocks of the weight's group_size in sequency order are GSR's rotation (arXiv 2505.03810).

    For a row of activations, ``forward(x) = x @ matrix().T``. The module has no parameters. Its only state is the
    signs, if it has them. Differentiable.

    Attributes:
        size: entries of a token.
        group_size: entries that are mixed with each other; with heads, heads that are mixed. Never None.
        order: ``"sequency"`` or ``"natural"``.
        heads: the number of heads across which entries are mixed, or None.
        signs: int8 [size] of +-1, a buffer, or None.
    """

    signs: Tensor | None

    def __init__(
        self,
        size: int,
        group_size: int | None = None,
        order: str = "sequency",
        heads: int | None = None,
        signs: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Describe a rotation. The constructor computes nothing.

        Args:
            size: entries of a token, the last dimension of the input.
            group_size: mix only entries of the same run of group_size entries (a block-diagonal R); with heads, only
                heads of the same run. It divides size (or heads) and is m * 2^k with m in
                ``rcp_kernels.ops.walsh_matrices.BASE_ORDERS``. None mixes all.
            order: of the rows of R inside a block: ``"sequency"`` or ``"natural"``.
            heads: the token is this many heads of size / heads entries. For each i, entry i of all heads is mixed: R is
                kron(T, I), where T transforms along the heads.
            signs: +-1 [size], multiplied into the token before the transform: a randomised Hadamard matrix. Only with
                natural order: signs scatter the sequency of R's columns, which is the purpose of sequency order.

        Raises:
            ValueError: a number that does not divide another, a size without a matrix, an unknown order, or signs that
                are not +-1, not one an entry, or given with sequency order.
        """
        super().__init__()
        check_one_of("OnlineRotation", "order", order, _ORDERS, "check the spelling")
        if size < 1:
            raise ValueError(f"OnlineRotation: size must be at least 1, got {size}; pass the features of a token")
        if heads is not None and (heads < 1 or size % heads):
            raise ValueError(
                f"OnlineRotation: heads must divide size, got {heads} heads and size {size}; pass size = heads * "
                f"head_dim"
            )
        mixed = size if heads is None else heads
        if group_size is not None and (group_size < 1 or mixed % group_size):
            raise ValueError(
                f"OnlineRotation: group_size must divide {'size' if heads is None else 'heads'}, got group_size "
                f"{group_size} and {mixed}; choose a divisor"
            )
        self.size = size
        self.group_size = mixed if group_size is None else group_size
        self.order = order
        self.heads = heads
        factor_size(self.group_size, "OnlineRotation")
        if signs is not None:
            signs = torch.as_tensor(signs)
            if order == "sequency":
                raise ValueError(
                    'OnlineRotation: signs need order="natural", got "sequency"; signs scatter the sequency of the '
                    "columns: leave them out or choose natural order"
                )
            if tuple(signs.shape) != (size,) or not (signs.is_meta or bool((signs.abs() == 1).all())):
                raise ValueError(
                    f"OnlineRotation: signs must be +1 or -1, one for each of {size} entries, got shape "
                    f"{tuple(signs.shape)}{'' if signs.is_meta else f' with {signs.unique().tolist()[:4]}'}; pass e.g. "
                    f"torch.randint(2, ({size},)) * 2 - 1"
                )
            signs = signs.to(torch.int8)
        self.register_buffer("signs", signs)

    def forward(self, x: Tensor) -> Tensor:
        """``R x``: float32, float16 or bfloat16 [..., size] -> the same shape and dtype."""
        return self._transform(x, walsh_transform)

    def inverse(self, y: Tensor) -> Tensor:
        """``R^T y``, which undoes :meth:`forward`: [..., size] -> the same shape and dtype."""
        return self._transform(y, walsh_transform, inverse=True)

    def apply_or_defer(self, x: Tensor) -> tuple[Tensor, Rotation]:
        """The arguments ``x`` and ``rotation`` of :func:`rcp_kernels.lut_linear` for the rotated x.

        The operator can rotate x itself, which is bit-equal and keeps the rotated token in cache. It has no heads and
        no signs: with these x is rotated here.
        """
        if self.heads is not None or self._buffers["signs"] is not None:
            return self(x), NO_ROTATION
        return x, Rotation(*transform_tables("OnlineRotation", x, self.group_size, self.order), self.group_size)

    def matrix(self) -> Tensor:
        """R as float64 [size, size], from dense matrices: ``forward(x) = x @ matrix().T``."""
        make = walsh_matrix if self.order == "sequency" else hadamard_matrix
        mixed = self.size if self.heads is None else self.heads
        matrix = torch.block_diag(*[make(self.group_size, normalized=True)] * (mixed // self.group_size))
        if self.heads is not None:
            matrix = torch.kron(matrix, torch.eye(self.size // self.heads, dtype=torch.float64))
        if self.signs is not None:
            matrix = matrix.to(self.signs.device) * self.signs
        return matrix

    def rotate_weight(self, weight: Tensor, side: str = "input") -> Tensor:
        """The weight of a linear layer with this rotation folded in, computed in float64.

        Args:
            weight: floating point [out_features, in_features].
            side: ``"input"``: W R^T, for a layer that takes *rotated* input and has the output of W.
                ``"output"``: R W, for a layer that takes plain input and has *rotated* output.

        Returns:
            float64, as weight in shape.

        Raises:
            ValueError: another side, or a weight whose features on that side are not ``size``.
        """
        check_one_of("OnlineRotation", "side", side, ("input", "output"), "check the spelling")
        dimension = 1 if side == "input" else 0
        if weight.dim() != 2 or weight.shape[dimension] != self.size:
            raise ValueError(
                f"OnlineRotation: a weight with {self.size} {side} features (size) is needed, got shape "
                f"{tuple(weight.shape)} ([out_features, in_features]); make the rotation for that layer"
            )
        # The rows of W R^T are R times the rows of W, and the columns of R W are R times the columns of W.
        if side == "input":
            return self._transform(weight.detach().to(torch.float64), walsh_transform_reference)
        return self._transform(weight.detach().to(torch.float64).T, walsh_transform_reference).T

    def fuse_into(self, linear: nn.Linear, side: str = "input") -> None:
        """Fold this rotation into a linear layer, in place, in float64.

        ``side="input"`` folds in the inverse: the new ``linear(rotation(x))`` is the old ``linear(x)``.
        ``side="output"`` folds in the rotation, also into the bias: the new ``linear(x)`` is the old
        ``rotation(linear(x))``. The two cancel if the output of one layer and the input of the next are rotated.
        Between these layers there may only be functions that commute with the rotation: a sum with another rotated
        output, a norm without gains.

        The Parameter keeps its identity, dtype and device: a tied weight changes in both modules. To keep the layer,
        copy it first, or use :func:`rotate_inputs`.

        Args:
            linear: floating point, with ``size`` features on that side.
            side: ``"input"`` or ``"output"``.

        Raises:
            TypeError: linear is not an ``nn.Linear``. A packed weight cannot be rotated; rotate before quantizing.
            ValueError: as :meth:`rotate_weight`, or side is ``"input"`` and the layer has an input_rotation.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"OnlineRotation: only an nn.Linear can take a rotation, got {type(linear).__name__}; fuse before "
                f"quantizing, or pass input_rotation to QuantLinear.from_linear"
            )
        if side == "input" and getattr(linear, "input_rotation", None) is not None:
            raise ValueError(
                f"OnlineRotation: a layer with an input_rotation cannot take a rotation of its input, got a "
                f"{type(linear).__name__} with {linear.input_rotation}; start from the plain nn.Linear"
            )
        weight = self.rotate_weight(linear.weight, side)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if side == "output" and linear.bias is not None:
                linear.bias.copy_(self._transform(linear.bias.to(torch.float64), walsh_transform_reference))

    def state(self) -> Tensor:
        """R without its signs: int64 [version, size, group_size, order, heads], on the CPU.

        The version is 1. The order is 0 for natural and 1 for sequency. heads is 0 for None.
        """
        entries = [_VERSION, self.size, self.group_size, _ORDERS.index(self.order), self.heads or 0]
        return torch.tensor(entries, dtype=torch.int64, device="cpu")

    @classmethod
    def from_state(cls, state: Tensor) -> OnlineRotation:
        """The rotation, without signs, that :meth:`state` describes.

        Raises:
            ValueError: another dtype or shape, a later version, or impossible numbers.
        """
        if state.dtype != torch.int64 or state.dim() != 1 or state.numel() < 1:
            raise ValueError(
                f"OnlineRotation: rotation must be int64 [version, size, group_size, order, heads], got {state.dtype} "
                f"of shape {tuple(state.shape)}; store it unconverted"
            )
        version, *fields = (int(entry) for entry in state.tolist())
        if version > _VERSION:  # before the number of entries: a later version may have more
            raise ValueError(
                f"OnlineRotation: version must be {_VERSION}, got {version}; a newer rcp-kernels wrote the file: "
                f"upgrade"
            )
        if len(fields) != 4 or fields[2] not in range(len(_ORDERS)):
            raise ValueError(
                f"OnlineRotation: rotation of version {_VERSION} is [version, size, group_size, order, heads] with "
                f"order 0 or 1, got {state.tolist()}; the file is damaged"
            )
        size, group_size, order, heads = fields
        return cls(size, group_size, _ORDERS[order], heads or None)

    def extra_repr(self) -> str:
        heads = "" if self.heads is None else f", heads={self.heads}"
        signs = "" if self.signs is None else ", signs=True"
        return f"size={self.size}, group_size={self.group_size}, order={self.order!r}{heads}{signs}"

    def _transform(self, x: Tensor, transform: Callable[..., Tensor], inverse: bool = False) -> Tensor:
        self._check(x)
        signs = self._buffers["signs"]
        if signs is not None:
            signs = signs.to(x.device)  # a rotation of weights is made on the CPU, for weights on any device
            x = x if inverse else x * signs
        if self.heads is None:
            x = transform(x, self.order, self.group_size, inverse=inverse)
        else:
            # [..., heads * d] -> [..., d, heads]: the transform runs along the last dimension.
            x = x.unflatten(-1, (self.heads, self.size // self.heads)).transpose(-1, -2)
            x = transform(x, self.order, self.group_size, inverse=inverse).transpose(-1, -2).flatten(-2)
        return x * signs if signs is not None and inverse else x

    def _check(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.size:
            raise ValueError(
                f"OnlineRotation: x must have {self.size} features in its last dimension (size), got shape "
                f"{tuple(x.shape)}; pass the activations that this rotation was made for"
            )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        signs = state_dict.get(prefix + "signs")
        if signs is not None and self.signs is not None and not signs.is_meta and not bool((signs.abs() == 1).all()):
            error_msgs.append(f"{prefix}signs: every sign must be +1 or -1; the checkpoint is damaged")
            return
        super()._load_from_state_dict(
            dict(state_dict), prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def check_input_rotation(where: str, rotation: object, in_features: int) -> None:
    """Raise unless ``rotation`` is an OnlineRotation of ``in_features`` entries.

    Raises:
        TypeError: another type.
        ValueError: another size.
    """
    if not isinstance(rotation, OnlineRotation):
        raise TypeError(
            f"{where}: input_rotation must be an OnlineRotation, got {type(rotation).__name__}; put any other module "
            f"before the layer"
        )
    if rotation.size != in_features:
        raise ValueError(
            f"{where}: input_rotation must have size {in_features} (in_features), got {rotation.size}; make the "
            f"rotation for this layer"
        )


def rotate_inputs(linear: nn.Linear, rotation: OnlineRotation | None = None) -> nn.Sequential:
    """The function of a linear layer, computed on rotated inputs: ``nn.Sequential(rotation, linear')``.

    Args:
        linear: not changed. linear' is a copy with the rotation folded into its weight in float64.
        rotation: of ``in_features`` entries; None mixes all of them in sequency order.

    Returns:
        The rotation (not a copy) and linear'.

    Raises:
        TypeError, ValueError: as :meth:`OnlineRotation.fuse_into`; ValueError also for in_features without a matrix.
    """
    if rotation is None:
        rotation = OnlineRotation(linear.in_features)
    linear = copy.deepcopy(linear)
    rotation.fuse_into(linear, "input")
    return nn.Sequential(rotation, linear)
