"""Standard normal numbers of counter blocks, as functions of Triton kernels: those of `kernels/cpp/gaussian.cpp`.

Every operation is one of IEEE 754 in float64, a fused multiply-add only where it is written, so the bits are those of
the C++ kernel. Kernels that use it are to be compiled with ``enable_fp_fusion=False``.

Importing this module imports Triton. Sources: see `kernels/cpp/gaussian.cpp`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normals", "philox"]


@triton.jit
def _full(like, VALUE: tl.constexpr):
    """A float64 constant: as an argument of ``fma`` a plain one would be float32."""
    return tl.full(like.shape, VALUE, tl.float64)


@triton.jit
def _next(z, total, COEFFICIENT: tl.constexpr):
    return tl.fma(z, total, _full(z, COEFFICIENT))


@triton.jit
def philox(block, step, tag, key0, key1):
    """Philox4x32-10: a block's two integers below 2**53, uint64.

    Args:
        block: numbers of counter blocks, int64, not negative.
        step: the counter's word 2, uint32.
        tag: its word 3, uint32.
        key0: low half of the seed, uint32.
        key1: high half.
    """
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0) + step, tl.zeros_like(c0) + tag
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32)), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32)), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    first = ((c0.to(tl.uint64) << 32) | c1.to(tl.uint64)) >> 11
    second = ((c2.to(tl.uint64) << 32) | c3.to(tl.uint64)) >> 11
    return first, second


@triton.jit
def _radius(k):
    """``sqrt(-2 log((k + 1) / 2**53))`` for k in [0, 2**53)."""
    x = (k + 1).to(tl.float64).to(tl.uint64, bitcast=True)
    above = (x - 0x3FE6A09E667F3BCD) >> 52  # bits of sqrt(1/2)
    e = above.to(tl.float64) - 53.0
    f = (x - (above << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)  # log(1 + f) = 2 atanh(s)
    z = s * s
    p = _next(z, _full(z, 0.14792106460434074), 0.15314463936613437)
    p = _next(z, p, 0.18183546731185826)
    p = _next(z, p, 0.2222219894788318)
    p = _next(z, p, 0.2857142873824967)
    p = _next(z, p, 0.39999999999436564)
    p = _next(z, p, 0.6666666666666731)
    half = f * f * 0.5
    tail = tl.fma(s, tl.fma(z, p, half), e * 2.3190468138462996e-17)
    return tl.sqrt(tl.fma(e, _full(e, 0.6931471805599453), f - (half - tail)) * -2.0)


@triton.jit
def _turn(k, r):
    """``r cos`` and ``r sin`` of ``2 pi (k + 1) / 2**53``."""
    angle = (k + 1).to(tl.float64) * 6.975736996017264e-16
    t = tl.fma(angle, _full(r, 0.6366197723675814), _full(r, 6755399441055744.0))  # 1.5 * 2**52
    n = t - 6755399441055744.0
    x = tl.fma(n, _full(r, -1.5707963267948966), angle)  # pi / 2 in two parts
    x = tl.fma(n, _full(r, -6.123233995736766e-17), x)
    z = x * x
    s = _next(z, _full(z, 1.5898741100042044e-10), -2.505079534377735e-08)
    s = _next(z, s, 2.7557313960810785e-06)
    s = _next(z, s, -0.00019841269830708902)
    s = _next(z, s, 0.008333333333323778)
    s = tl.fma(z * x, _next(z, s, -0.16666666666666638), x)
    c = _next(z, _full(z, -1.1368836790487463e-11), 2.0875910562187345e-09)
    c = _next(z, c, -2.755731581309301e-07)
    c = _next(z, c, 2.4801587294870256e-05)
    c = _next(z, c, -0.0013888888888883364)
    c = _next(z, c, 0.04166666666666666)
    c = tl.fma(z * z, c, tl.fma(z, _full(z, -0.5), _full(z, 1.0)))
    quadrant = t.to(tl.int64, bitcast=True) & 3
    odd = (quadrant & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return r * cosine, r * tl.where(quadrant >= 2, -sine, sine)


@triton.jit
def normals(block, step, tag, key0, key1):
    """Elements ``2 block`` and ``2 block + 1`` of the noise in turns, float64 ``[2 n]``; see :func:`philox`."""
    first, second = philox(block, step, tag, key0, key1)  # type: ignore
    cosine, sine = _turn(second, _radius(first))
    return tl.interleave(cosine, sine)
