"""The Triton kernels of the small matrices; ``triton_coefficients`` says what each computes and starts them.

All products are as exact as float32, whatever the TF32 switches say. Letters as in ``channel_equilibrium``; a pointer
that an option switches off is not read. Indices: n a sample, g a group, i and j its channels, h a hidden unit.
"""

import torch
import triton
import triton.language as tl

from . import gate as gate_module
from . import maps, precision

SCATTER_UNIT = tl.constexpr(maps.SCATTER_UNIT)
LAYER_NORM_EPS = tl.constexpr(gate_module.LAYER_NORM_EPS)
LARGE_VARIANCE = tl.constexpr(gate_module.LARGE_VARIANCE)
ROUNDING = tl.constexpr(precision.rounding_variance(torch.float32))
LEAST_VARIANCE = tl.constexpr(precision.least_variance(torch.float32))


@triton.jit
def norm_affine(mean, variance, weight, bias, eps, channels, has_norm: tl.constexpr):
    """Return a and b of the norm x = a z + b, and a / weight."""
    rstd = tl.full(channels.shape, 1.0, tl.float32)
    a, b = rstd, tl.zeros(channels.shape, tl.float32)
    if has_norm:
        rstd = 1 / tl.sqrt_rn(tl.load(variance + channels).to(tl.float32) + eps)
        a = tl.load(weight + channels).to(tl.float32) * rstd
        b = tl.load(bias + channels).to(tl.float32) - tl.load(mean + channels).to(tl.float32) * a
    return a, b, rstd


@triton.jit
def mean_variance_of(sums, num_groups, max_groups: tl.constexpr):
    """Return the mean of all variances, and whether it is no more than rounding; see ``batch.batch_statistics``."""
    groups = tl.arange(0, max_groups)
    there = groups < num_groups
    mean_variance = tl.sum(tl.load(sums + 2 * groups, mask=there, other=0.0), 0)
    mean_square = tl.sum(tl.load(sums + 2 * groups + 1, mask=there, other=0.0), 0)
    return mean_variance, mean_variance <= mean_square * ROUNDING + LEAST_VARIANCE


@triton.jit
def dot(left, right):
    # three TF32 products are as exact as float32; IEEE products of 64 x 64 would not fit into the registers
    return tl.dot(left, right, input_precision='ieee' if left.shape[0] <= 16 else 'tf32x3')


@triton.jit
def identity(d: tl.constexpr):
    return (tl.arange(0, d)[:, None] == tl.arange(0, d)[None, :]).to(tl.float32)


@triton.jit
def batch_kernel(
    sample_means, scatter, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, eps, center, mean, covariance,
    normalized, trace, whitening, sums, num_samples, num_groups, length, d: tl.constexpr, num_iterations: tl.constexpr,
    has_norm: tl.constexpr,
):  # fmt: skip
    """Sigma of group g from the moments of the samples, and P_T; and what the group adds to the means that s needs."""
    g = tl.program_id(0)
    i = tl.arange(0, d)
    square = i[:, None] * d + i[None, :]
    a, b, _ = norm_affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, g * d + i, has_norm)
    common = tl.zeros((d,), tl.float32)
    variances = tl.zeros((d,), tl.float32)
    squares = tl.zeros((d,), tl.float32)
    share = 1.0 / (num_samples * num_groups * d)  # shares are summed, since the sum alone could overflow
    for n in range(num_samples):
        row = n * num_groups + g
        m = tl.load(sample_means + row * d + i)
        common += m
        squares += share * (a * m + b) * (a * m + b)
        variances += tl.load(scatter + row * d * d + i * (d + 1))
    common /= num_samples
    sigma = tl.zeros((d, d), tl.float32)
    for n in range(num_samples):
        row = n * num_groups + g
        between = tl.load(sample_means + row * d + i) - common
        sigma += tl.load(scatter + row * d * d + square) / (length / SCATTER_UNIT) + between[:, None] * between[None, :]
    sigma /= num_samples
    tl.store(center + g * d + i, common)
    tl.store(mean + g * d + i, a * common + b)
    tl.store(covariance + g * d * d + square, sigma)
    eye = identity(d)
    sigma = a[:, None] * sigma * a[None, :] + eps * eye
    total = tl.sum(tl.sum(sigma * eye, 1), 0)
    y = sigma / total
    tl.store(normalized + g * d * d + square, y)
    tl.store(trace + g, total)
    tl.store(sums + 2 * g, tl.sum(variances * (share * SCATTER_UNIT / tl.maximum(length - 1, 1)) * a * a, 0))
    tl.store(sums + 2 * g + 1, tl.sum(squares, 0))
    p = 1.5 * eye - 0.5 * y
    step = p
    for _ in range(num_iterations - 1):
        y = dot(y, step)
        step = 1.5 * eye - 0.5 * dot(p, y)
        p = dot(step, p)
    tl.store(whitening + g * d * d + square, p)


@triton.jit
def hidden_kernel(
    scatter, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, fc1, hidden, num_channels, num_hidden, length,
    d: tl.constexpr, units: tl.constexpr, block: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr,
):  # fmt: skip
    """W1 v_n, a block of hidden units a program. In evaluation ``scatter`` holds the diagonals alone."""
    h = tl.program_id(0) * units + tl.arange(0, units)
    n = tl.program_id(1)
    total = tl.zeros((units, block), tl.float32)
    for start in range(0, num_channels, block):
        c = start + tl.arange(0, block)
        there = c < num_channels
        c = tl.where(there, c, 0)
        a, _, _ = norm_affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm)
        channel = n * num_channels + c
        index = channel // d * d * d + c % d * (d + 1) if training else channel
        v = a * a * (tl.load(scatter + index) / (tl.maximum(length - 1, 1) / SCATTER_UNIT))
        v = tl.where(there, v, 0.0)
        w1 = tl.load(fc1 + h[:, None] * num_channels + c[None, :], mask=(h < num_hidden)[:, None], other=0.0)
        total += w1.to(tl.float32) * v[None, :]
    tl.store(hidden + n * num_hidden + h, tl.sum(total, 1), mask=h < num_hidden)


@triton.jit
def mixture_kernel(
    hidden, sums, whitening, running_scale, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, alpha, theta,
    ln_weight, ln_bias, fc2, matrix, constant, gate, reduced, rectified, ln_unit, ln_mean, ln_rstd, batch_scale,
    whitening_used, num_samples, num_groups, num_hidden, d: tl.constexpr, max_groups: tl.constexpr,
    max_hidden: tl.constexpr, block: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr,
    has_alpha: tl.constexpr,
):  # fmt: skip
    """The gate of the group's channels in sample n, s, and M_{n,g} with the norm folded in."""
    g, n = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, d)
    c = g * d + i
    square = i[:, None] * d + i[None, :]
    every = tl.arange(0, max_hidden)
    values = tl.load(hidden + n * num_hidden + every, mask=every < num_hidden, other=0.0)
    unit = tl.maximum(tl.max(tl.abs(values), 0) / LARGE_VARIANCE, 1.0)  # it keeps the squares of large ones finite
    values /= unit
    mean = tl.sum(values, 0) / num_hidden
    centered = tl.where(every < num_hidden, values - mean, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(centered * centered, 0) / num_hidden + LAYER_NORM_EPS)
    if g == 0:
        tl.store(reduced + n * num_hidden + every, values, mask=every < num_hidden)
        tl.store(ln_unit + n, unit)
        tl.store(ln_mean + n, mean)
        tl.store(ln_rstd + n, rstd)
    logits = tl.zeros((d, block), tl.float32)
    for start in range(0, num_hidden, block):
        h = start + tl.arange(0, block)
        there = h < num_hidden
        normed = (tl.load(hidden + n * num_hidden + h, mask=there, other=0.0) / unit - mean) * rstd
        normed *= tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
        normed += tl.load(ln_bias + h, mask=there, other=0.0).to(tl.float32)
        normed = tl.where(normed < 0, 0.0, normed)
        if g == 0:
            tl.store(rectified + n * num_hidden + h, normed, mask=there)
        w2 = tl.load(fc2 + c[:, None] * num_hidden + h[None, :], mask=there[None, :], other=0.0)
        logits += w2.to(tl.float32) * normed[None, :]
    gates = 1 / (1 + tl.exp(-tl.sum(logits, 1)))
    if training:
        mean_variance, lacks_variance = mean_variance_of(sums, num_groups, max_groups)
        # without spatial variance there is nothing to equalize: s = 1
        s = tl.sqrt_rn(tl.where(lacks_variance, 1.0, mean_variance))
    else:
        s = tl.load(running_scale).to(tl.float32)
    p = tl.load(whitening + g * d * d + square).to(tl.float32)
    lambda_logit = tl.load(theta).to(tl.float32)
    eye = identity(d)
    reweighting = gates / (s * (1 + tl.exp(lambda_logit)))
    m = p / (1 + tl.exp(-lambda_logit)) + eye * reweighting[:, None]
    if has_alpha:
        m = eye + tl.load(alpha).to(tl.float32) * (m - eye)
    if has_norm:
        a, b, _ = norm_affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm)
        tl.store(constant + (n * num_groups + g) * d + i, tl.sum(m * b[None, :], 1))
        m = m * a[None, :]
    tl.store(matrix + (n * num_groups + g) * d * d + square, m)
    tl.store(gate + n * num_groups * d + c, gates)
    if n == 0:
        if not training:  # a copy: the running values may move before the backward pass
            tl.store(whitening_used + g * d * d + square, p)
        if g == 0:
            tl.store(batch_scale, s)
