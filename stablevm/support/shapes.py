"""Short descriptions of tensors, by type and shape, for messages and for printed dataclasses."""

from dataclasses import fields
from typing import Any

from torch import Tensor


def described(values: Tensor) -> str:
    """The dtype and shape of a tensor, such as `torch.float32 (64, 4, 32, 32)`."""
    return f"{values.dtype} {tuple(values.shape)}"


class ShownByShape:
    """Base class of dataclasses that hold tensors: printing one shows the type, shape and device of each tensor."""

    def __repr__(self) -> str:
        shown = [f"{field.name}={_shown(getattr(self, field.name))}" for field in fields(self) if field.repr]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    return f"{described(value)} on {value.device}" if isinstance(value, Tensor) else repr(value)
