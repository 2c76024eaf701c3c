"""A float linear layer that rotates its own input, and the other places where a rotation runs inside a model."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .online_rotation import OnlineRotation

__all__ = ["RotatedLinear", "rotate_around", "rotate_output", "rotate_queries_and_keys"]


class RotatedLinear(nn.Linear):
    """``y = W' R x + bias``: an ``nn.Linear`` on rotated input, the float counterpart of a rotated ``QuantLinear``.

    ``weight`` is W', with the rotation folded in already. The rotation is no part of ``state_dict``: a checkpoint has
    to say elsewhere that there is one (:class:`rcp_kernels.methods.rotate.Rotated`).

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
        if not isinstance(input_rotation, OnlineRotation):
            raise TypeError(
                f"RotatedLinear: input_rotation must be an OnlineRotation, got {type(input_rotation).__name__}; use "
                f"nn.Linear where there is none"
            )
        if input_rotation.size != in_features:
            raise ValueError(
                f"RotatedLinear: input_rotation must have size {in_features} (in_features), got {input_rotation.size}; "
                f"make the rotation for this layer"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.input_rotation = input_rotation

    @classmethod
    def from_linear(cls, linear: nn.Linear, input_rotation: OnlineRotation) -> RotatedLinear:
        """Put a rotation before a layer whose weight has it folded in already; its Parameters are taken, not copied.

        Args:
            linear: left without use; :meth:`OnlineRotation.fuse_into` folds a rotation into it.
            input_rotation: of in_features entries; kept, not copied.

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
    """Let a module give ``rotation(module(x))``; the rotation becomes its submodule ``output_rotation``.

    For a norm with gains right before the residual stream, whose output no weight can rotate.

    Raises:
        ValueError: the module's output is rotated already.
    """
    _refuse_second(module, "output_rotation")
    module.output_rotation = rotation
    module.register_forward_hook(_rotate_output)


def _rotate_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    rotation = module.output_rotation
    assert isinstance(rotation, OnlineRotation)
    return rotation(output)


def rotate_around(module: nn.Module, rotation: OnlineRotation) -> None:
    """Let a module take rotated input and give rotated output: ``rotation(module(rotation.inverse(x)))``.

    For the final norm, whose gain acts in the basis that it was trained in. The rotation becomes the submodule
    ``basis_rotation``.

    Raises:
        ValueError: the module does so already.
    """
    _refuse_second(module, "basis_rotation")
    module.basis_rotation = rotation
    module.register_forward_pre_hook(_leave_basis)
    module.register_forward_hook(_return_to_basis)


def _leave_basis(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rotation = module.basis_rotation
    assert isinstance(rotation, OnlineRotation)
    return (rotation.inverse(args[0]), *args[1:])


def _return_to_basis(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    rotation = module.basis_rotation
    assert isinstance(rotation, OnlineRotation)
    return rotation(output)


class _RotatedSin(NamedTuple):
    """The second of RoPE's two tables, and what is to follow RoPE."""

    sin: Tensor
    rotation: OnlineRotation


def rotate_queries_and_keys(attention: nn.Module, rotation: OnlineRotation) -> None:
    """Rotate the queries and keys of an attention module of ``transformers`` after RoPE, before the keys are cached.

    The scores do not change, as both are rotated; what a key/value cache stores does. The rotation becomes the
    submodule ``qk_rotation``. It applies with or without a cache, and with every attention implementation.

    How: nothing between RoPE and the cache can be hooked, but the function that RoPE is can be told. A hook on
    ``attention`` hands the rotation on with the tables that it receives (``position_embeddings``), and the name
    ``apply_rotary_pos_emb`` in the model's source module is bound to a function that understands it, and calls the
    original one. Other models of that source are not affected. Should a version of transformers not pass the tables
    that way, the forward pass fails: it never goes on without the rotation.

    Args:
        attention: whose ``forward`` takes ``position_embeddings`` and calls ``apply_rotary_pos_emb``.
        rotation: of head_dim entries.

    Raises:
        ValueError: the queries are rotated already, or forward does not call that function.
    """
    _refuse_second(attention, "qk_rotation")
    rotary = _teach_rotary(type(attention))
    for name, value in list(vars(attention).items()):
        if value is rotary.__wrapped__:  # transformers 5.0 keeps the function in the module, which would not pickle
            setattr(attention, name, rotary)
    attention.qk_rotation = rotation
    attention.register_forward_pre_hook(_pass_rotation_on, with_kwargs=True)


def _pass_rotation_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.compiler.is_compiling():
        _teach_rotary(type(module))  # a pickled model may be the first one that its process sees
    if "position_embeddings" not in kwargs:
        raise RuntimeError(
            f"rotate_queries_and_keys: {type(module).__name__} must be called with position_embeddings=..., got "
            f"{sorted(kwargs)}; this version of transformers is not supported: rotate with r3=False"
        )
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos, _RotatedSin(sin, module.qk_rotation))}  # type: ignore[arg-type]


def _teach_rotary(attention: type[nn.Module]) -> Any:
    """Bind ``apply_rotary_pos_emb``, as a class of attention modules calls it, to one that knows `_RotatedSin`.

    Returns:
        That function; the original one is its ``__wrapped__``.
    """
    namespace = inspect.unwrap(attention.forward).__globals__
    original = namespace.get("apply_rotary_pos_emb")
    if original is None:
        raise ValueError(
            f"rotate_queries_and_keys: forward of {attention.__name__} must call apply_rotary_pos_emb, which "
            f"{namespace['__name__']} does not have; rotate with r3=False"
        )
    if getattr(original, "knows_rotated_sin", False):
        return original

    @functools.wraps(original)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(sin, _RotatedSin):
            return original(q, k, cos, sin, *args, **kwargs)
        q, k = original(q, k, cos, sin.sin, *args, **kwargs)
        return sin.rotation(q), sin.rotation(k)

    apply_rotary_pos_emb.knows_rotated_sin = True  # type: ignore[attr-defined]
    namespace["apply_rotary_pos_emb"] = apply_rotary_pos_emb
    return apply_rotary_pos_emb


def _refuse_second(module: nn.Module, name: str) -> None:
    if hasattr(module, name):
        raise ValueError(
            f"{type(module).__name__}: it must have no {name} yet, got one; it is rotated already: start from the "
            f"model as it was loaded"
        )
