"""A float linear layer that rotates its input, and hooks that rotate at other places of a model."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .online_rotation import OnlineRotation, check_input_rotation

__all__ = ["RotatedLinear", "rotate_around", "rotate_output", "rotate_queries_and_keys"]


class RotatedLinear(nn.Linear):
    """``y = W' R x + bias``: an ``nn.Linear`` on rotated input, the float counterpart of a rotated ``QuantLinear``.

    ``weight`` is W', with the rotation folded in. ``state_dict`` does not have the rotation: a checkpoint must record
    it elsewhere (:class:`rcp_kernels.methods.rotate.Rotated`).

    Attributes:
        input_rotation: OnlineRotation of in_features entries.
    """

    input_rotation: OnlineRotation

    def __init__(
        self,
        in_features: int,
        out_features: int,
        input_rotation: OnlineRotation,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with ``nn.Linear``'s random weight.

        Raises:
            TypeError: input_rotation is not an OnlineRotation.
            ValueError: its size is not in_features.
        """
        check_input_rotation("RotatedLinear", input_rotation, in_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.input_rotation = input_rotation

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_rotation: OnlineRotation) -> RotatedLinear:
        """Put a rotation before a layer whose weight has it folded in.

        Args:
            linear: its Parameters are used, not copied. :meth:`OnlineRotation.fuse_into` folds a rotation into it.
            input_rotation: of in_features entries; not copied.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        module = cls(linear.in_features, linear.out_features, input_rotation, bias=False, device="meta")
        module.weight = linear.weight
        module.bias = linear.bias
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return functional.linear(self.input_rotation(x), self.weight, self.bias)


def rotate_output(module: nn.Module, rotation: OnlineRotation) -> None:
    """Make a module return ``rotation(module(x))``. The rotation becomes its submodule ``output_rotation``.

    This is for a norm with gains just before the residual stream, whose output no weight can rotate.

    Raises:
        ValueError: the module's output is rotated already.
    """
    _refuse_second(module, "output_rotation")
    module.output_rotation = rotation
    module.register_forward_hook(functools.partial(_rotate_by, "output_rotation"))


def _rotate_by(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return getattr(module, name)(output)


def rotate_around(module: nn.Module, rotation: OnlineRotation) -> None:
    """Make a module take rotated input and return rotated output: ``rotation(module(rotation.inverse(x)))``.

    This is for the final norm, whose gain acts in the basis of its training. The rotation becomes the submodule
    ``basis_rotation``.

    Raises:
        ValueError: the module has a basis_rotation already.
    """
    _refuse_second(module, "basis_rotation")
    module.basis_rotation = rotation
    module.register_forward_pre_hook(_leave_basis)
    module.register_forward_hook(functools.partial(_rotate_by, "basis_rotation"))


def _leave_basis(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.basis_rotation.inverse(args[0]), *args[1:])


class _RotatedSin(NamedTuple):
    """The second of RoPE's two tables, and the rotation after RoPE."""

    sin: Tensor
    rotation: OnlineRotation


def rotate_queries_and_keys(attention: nn.Module, rotation: OnlineRotation) -> None:
    """Rotate the queries and keys of an attention module of ``transformers`` after RoPE, before the keys are cached.

    The scores do not change, as both are rotated. The keys in a cache do. The rotation becomes the submodule
    ``qk_rotation``. It applies with or without a cache, and with every attention implementation.

    There is no hook between RoPE and the cache. A hook on ``attention`` therefore puts the rotation into the tables
    that it receives (``position_embeddings``). The name ``apply_rotary_pos_emb`` in the model's source module is bound
    to a function that takes such tables and calls the original function. Other models of that source are not affected.
    If a version of transformers does not pass the tables in this way, the forward pass raises an error.

    Args:
        attention: a module whose ``forward`` takes ``position_embeddings`` and calls ``apply_rotary_pos_emb``.
        rotation: of head_dim entries.

    Raises:
        ValueError: the queries are rotated already, or forward does not call that function.
    """
    _refuse_second(attention, "qk_rotation")
    rotary = _wrap_rotary(type(attention))
    for name, value in list(vars(attention).items()):
        if (
            value is rotary.__wrapped__
        ):  # transformers 5.0 stores the function in the module, which then does not pickle
            setattr(attention, name, rotary)
    attention.qk_rotation = rotation
    attention.register_forward_pre_hook(_add_rotation, with_kwargs=True)


def _add_rotation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.compiler.is_compiling():
        _wrap_rotary(type(module))  # in a new process a pickled model comes without the wrapped function
    if "position_embeddings" not in kwargs:
        raise RuntimeError(
            f"rotate_queries_and_keys: {type(module).__name__} must be called with position_embeddings=..., got "
            f"{sorted(kwargs)}; this version of transformers is not supported: rotate with r3=False"
        )
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos, _RotatedSin(sin, module.qk_rotation))}  # type: ignore[arg-type]


def _wrap_rotary(attention: type[nn.Module]) -> Any:
    """Make the ``apply_rotary_pos_emb`` that a class of attention modules calls take a `_RotatedSin`.

    Returns:
        The new function. Its ``__wrapped__`` is the original function.
    """
    namespace = inspect.unwrap(attention.forward).__globals__
    original = namespace.get("apply_rotary_pos_emb")
    if original is None:
        raise ValueError(
            f"rotate_queries_and_keys: forward of {attention.__name__} must call apply_rotary_pos_emb, which "
            f"{namespace['__name__']} does not have; rotate with r3=False"
        )
    if getattr(original, "takes_rotated_sin", False):
        return original

    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(sin, _RotatedSin):
            return original(q, k, cos, sin, *args, **kwargs)
        q, k = original(q, k, cos, sin.sin, *args, **kwargs)
        return sin.rotation(q), sin.rotation(k)

    apply_rotary_pos_emb.takes_rotated_sin = True  # type: ignore[attr-defined]
    namespace["apply_rotary_pos_emb"] = apply_rotary_pos_emb
    return apply_rotary_pos_emb


def _refuse_second(module: nn.Module, name: str) -> None:
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__}: {name} must not be there yet, got {getattr(module, name)}; the model is rotated "
            f"already: start from the float model"
        )
