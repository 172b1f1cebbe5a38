"""What a Triton kernel does with a finished tile of results: bias, activation, gate.

All activations but ReLU are ``v * sigmoid(u(v))``: two instructions of the special function unit and a few more, while
a library's ``erf`` takes about forty and isn't hidden behind the product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finished(
    acc, bias_ptr, gate_ptr, inside, BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr
):
    """``act(acc + bias)``, or ``act(gate) * (acc + bias)``; ``bias_ptr`` (N,), ``gate_ptr`` and ``inside`` (M, N)."""
    if BIAS:
        acc += tl.load(bias_ptr).to(tl.float32)[None, :]
    if GATED:
        gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
        return acc * activated(gate, ACT, FAST)
    return activated(acc, ACT, FAST)


@triton.jit
def activated(v, ACT: tl.constexpr, FAST: tl.constexpr):
    if ACT == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACT == "silu":
        v = v * sigmoid(v, FAST)
    if ACT == "gelu_tanh":  # 0.5 (1 + tanh(u)) is sigmoid(2 u)
        v = v * sigmoid(v * (1.5957691216 + 0.0713548163 * v * v), FAST)
    if ACT == "gelu":
        # Phi(v) = sigmoid(v q(v^2)) with q fitted to it: within 3e-6 of v Phi(v) everywhere
        z = v * v
        q = 2.2381721e-6 * z - 6.1162140e-5
        q = q * z - 2.4972267e-4
        q = q * z + 7.2937581e-2
        v = v * sigmoid(v * (q * z + 1.5956563), FAST)
    return v


@triton.jit
def sigmoid(v, FAST: tl.constexpr):
    if FAST:  # approximate instructions, which Triton's own exp and division wrap in more
        return tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.ftz.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f",
            [v * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(tl.minimum(-v, 80.0)))  # the interpreter warns of overflows
