"""One product form per file: how it is recognised, and how it is computed with a Monarch matrix.

The same rules read captured graphs (``passes/candidates.py``), rewrite graphs (``passes/graph.py``) and answer the
calls of a running model (``layers/dense_like.py``).
"""

from monarch_fx.rules.addmm import addmm
from monarch_fx.rules.base import Multiply, Product, Refusal, Rule, Static, op_name
from monarch_fx.rules.convolution import conv_any, conv_transpose, convolution
from monarch_fx.rules.einsum import einsum
from monarch_fx.rules.grouped import grouped_mm
from monarch_fx.rules.linear import linear
from monarch_fx.rules.matmul import matmul, rmatmul
from monarch_fx.rules.unsupported import refuse

_RECURRENT = refuse("inside a recurrent kernel")

RULES: dict[str, Rule] = {
    "linear": linear,
    "matmul": matmul,
    "linalg_matmul": matmul,
    "mm": matmul,
    "mv": matmul,
    "bmm": matmul,
    "__matmul__": matmul,
    "__rmatmul__": rmatmul,
    "addmm": addmm,
    "addmv": addmm,
    "baddbmm": addmm,
    "einsum": einsum,
    "conv1d": convolution,
    "conv2d": convolution,
    "conv3d": convolution,
    "convolution": conv_any,
    "_convolution": refuse("an internal form of convolution"),
    "conv_transpose1d": conv_transpose,
    "conv_transpose2d": conv_transpose,
    "conv_transpose3d": conv_transpose,
    "grouped_mm": grouped_mm,
    "_grouped_mm": grouped_mm,
    "transformers::grouped_mm_fallback": grouped_mm,
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn_tanh": _RECURRENT,
    "rnn_relu": _RECURRENT,
    "bilinear": refuse("a bilinear form has two activations"),
    "tensordot": refuse("tensordot: write it as matmul or einsum"),
    "inner": refuse("inner: write it as matmul or F.linear"),
    "linalg_multi_dot": refuse("multi_dot: write it as matmul"),
}

__all__ = ["RULES", "Multiply", "Product", "Refusal", "Rule", "Static", "op_name"]
