"""The activation functions of GPT-2 checkpoints, by the names that `config.json` has for them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor


def _gelu_tanh(x: "Tensor") -> "Tensor":
    from torch.nn import functional

    return functional.gelu(x, approximate="tanh")


def _gelu(x: "Tensor") -> "Tensor":
    from torch.nn import functional

    return functional.gelu(x)


def _quick_gelu(x: "Tensor") -> "Tensor":
    return x * (1.702 * x).sigmoid()


def _silu(x: "Tensor") -> "Tensor":
    return x * x.sigmoid()


def _relu_squared(x: "Tensor") -> "Tensor":
    return x.relu().square()


def _mish(x: "Tensor") -> "Tensor":
    from torch.nn import functional

    return functional.mish(x)


def _identity(x: "Tensor") -> "Tensor":
    return x


# The same functions under the same names as transformers' ACT2FN.
ACTIVATIONS: Final[dict[str, Callable[["Tensor"], "Tensor"]]] = {
    "gelu": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "linear": _identity,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": lambda x: x.relu(),
    "relu2": _relu_squared,
    "relu6": lambda x: x.clamp(0.0, 6.0),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": _silu,
    "swish": _silu,
    "tanh": lambda x: x.tanh(),
}
