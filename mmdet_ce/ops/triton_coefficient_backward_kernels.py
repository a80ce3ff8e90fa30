"""The Triton kernels of the small matrices' backward pass; ``triton_coefficients`` starts them.

Letters and indices as in ``triton_coefficient_kernels``.
"""

import triton
import triton.language as tl

from .triton_coefficient_kernels import SCATTER_UNIT, dot, identity, mean_variance_of, norm_affine


@triton.jit
def mixture_backward_kernel(
    d_matrix, d_constant, whitening, batch_scale, gate, normalized, trace, covariance, norm_mean, norm_variance,
    norm_weight, norm_bias, norm_eps, alpha, theta, d_logits, d_affine, d_scalars, d_sigma, num_samples, num_groups,
    length, d: tl.constexpr, num_iterations: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr,
    has_alpha: tl.constexpr,
):  # fmt: skip
    """From dM to the gate's logits, theta, alpha, a and b, and through P_T and Sigma to the covariance of z."""
    g = tl.program_id(0)
    i = tl.arange(0, d)
    c = g * d + i
    square = i[:, None] * d + i[None, :]
    eye = identity(d)
    a, b, _ = norm_affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm)
    p = tl.load(whitening + g * d * d + square)
    s = tl.load(batch_scale)
    lambda_logit = tl.load(theta).to(tl.float32)
    lambda_, rest = 1 / (1 + tl.exp(-lambda_logit)), 1 / (1 + tl.exp(lambda_logit))
    share = 1.0
    if has_alpha:
        share = tl.load(alpha).to(tl.float32)
    d_whitening = tl.zeros((d, d), tl.float32)
    d_a = tl.zeros((d,), tl.float32)
    d_b = tl.zeros((d,), tl.float32)
    d_alpha = tl.zeros((d,), tl.float32)
    towards_scale = tl.zeros((d,), tl.float32)
    for n in range(num_samples):
        row = n * num_groups + g
        dm = tl.load(d_matrix + row * d * d + square)
        gates = tl.load(gate + row * d + i)
        reweighting = rest / s * gates
        ce_matrix = lambda_ * p + eye * reweighting[:, None]
        if has_norm:
            m = eye + share * (ce_matrix - eye) if has_alpha else ce_matrix
            dc = tl.load(d_constant + row * d + i)
            d_a += tl.sum(m * dm, 0)
            d_b += tl.sum(m * dc[:, None], 0)
            dm = dm * a[None, :] + dc[:, None] * b[None, :]
        if has_alpha:
            d_alpha += tl.sum(dm * (ce_matrix - eye), 1)
            dm = share * dm
        d_whitening += lambda_ * dm
        by_reweighting = tl.sum(dm * eye, 1) * reweighting
        towards_scale += by_reweighting
        tl.store(d_logits + row * d + i, by_reweighting * (1 - gates))
    towards_whitening = tl.sum(tl.sum(d_whitening * p, 1), 0)
    towards_scale_sum = tl.sum(towards_scale, 0)
    tl.store(d_scalars + 3 * g, rest * towards_whitening - lambda_ * towards_scale_sum)
    tl.store(d_scalars + 3 * g + 1, tl.sum(d_alpha, 0))
    tl.store(d_scalars + 3 * g + 2, towards_scale_sum)
    if training:
        y = tl.load(normalized + g * d * d + square)
        d_normalized = _newton_derivative(y, d_whitening, d, num_iterations)
        along = tl.sum(tl.sum(d_normalized * y, 1), 0)
        ds = (d_normalized - along * eye) / tl.load(trace + g) * a[None, :]
        if has_norm:
            d_a += 2 * tl.sum(ds * tl.load(covariance + g * d * d + square), 1)
        ds = a[:, None] * ds * (2.0 / (1.0 * num_samples * length))
        tl.store(d_sigma + g * d * d + square, ds)
    tl.store(d_affine + 2 * g * d + i, d_a)
    tl.store(d_affine + (2 * g + 1) * d + i, d_b)


@triton.jit
def _newton_derivative(normalized, d_whitening, d: tl.constexpr, num_iterations: tl.constexpr):
    """Return the derivative of P_T in the symmetric part of ``d_whitening``, step by step beside P_T itself."""
    eye = identity(d)
    y = normalized
    dy = 0.5 * (d_whitening + tl.trans(d_whitening))
    p = 1.5 * eye - 0.5 * y
    dp = -0.5 * dy
    step, d_step = p, dp
    for _ in range(num_iterations - 1):
        dy = dot(y, d_step) + dot(dy, step)
        y = dot(y, step)
        d_step = -0.5 * (dot(p, dy) + dot(dp, y))
        step = 1.5 * eye - 0.5 * dot(p, y)
        dp = dot(step, dp) + dot(d_step, p)
        p = dot(step, p)
    return dp


@triton.jit
def hidden_backward_kernel(
    d_logits, rectified, fc2, d_normed, d_fc2, num_samples, num_channels, num_hidden, units: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Through W2 and ReLU: for sample n the gradient before ReLU; in the program after the last sample that of W2."""
    h = tl.program_id(0) * units + tl.arange(0, units)
    n = tl.program_id(1)
    there = h < num_hidden
    if n < num_samples:
        total = tl.zeros((block, units), tl.float32)
        for start in range(0, num_channels, block):
            c = start + tl.arange(0, block)
            dl = tl.load(d_logits + n * num_channels + c, mask=c < num_channels, other=0.0)
            inside = (c < num_channels)[:, None] & there[None, :]
            total += dl[:, None] * tl.load(fc2 + c[:, None] * num_hidden + h[None, :], mask=inside, other=0.0)
        stopped = tl.load(rectified + n * num_hidden + h, mask=there, other=0.0) <= 0
        tl.store(d_normed + n * num_hidden + h, tl.where(stopped, 0.0, tl.sum(total, 0)), mask=there)
    else:
        for start in range(0, num_channels, block):
            c = start + tl.arange(0, block)
            total = tl.zeros((block, units), tl.float32)
            for k in range(num_samples):
                dl = tl.load(d_logits + k * num_channels + c, mask=c < num_channels, other=0.0)
                total += dl[:, None] * tl.load(rectified + k * num_hidden + h, mask=there, other=0.0)[None, :]
            inside = (c < num_channels)[:, None] & there[None, :]
            tl.store(d_fc2 + c[:, None] * num_hidden + h[None, :], total, mask=inside)


@triton.jit
def gate_backward_kernel(
    d_reduced, ln_unit, fc1, sample_means, scatter, center, d_sigma, d_affine, d_scalars, sums, batch_scale, norm_mean,
    norm_variance, norm_weight, norm_bias, norm_eps, k_matrix, k_vector, d_norm_weight, d_norm_bias, d_alpha, d_theta,
    d_fc1, num_samples, num_groups, num_hidden, length, d: tl.constexpr, max_groups: tl.constexpr, block: tl.constexpr,
    training: tl.constexpr, has_norm: tl.constexpr, has_alpha: tl.constexpr,
):  # fmt: skip
    """Through W1 to v: for sample n what dx needs; in the program after the last, the parameters."""
    g, n = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, d)
    c = g * d + i
    a, _, rstd = norm_affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm)
    groups = tl.arange(0, max_groups)
    there = groups < num_groups
    by_scale = 0.0
    if training:  # s = sqrt(mean(v))
        _, lacks_variance = mean_variance_of(sums, num_groups, max_groups)
        towards = tl.sum(tl.load(d_scalars + 3 * groups + 2, mask=there, other=0.0), 0)
        s = tl.load(batch_scale)
        by_scale = tl.where(lacks_variance, 0.0, towards / (2 * num_samples * num_groups * d) / (s * s))
    if n < num_samples:
        _dx_coefficients(
            n, a, by_scale, d_reduced, ln_unit, fc1, sample_means, center, d_sigma, k_matrix, k_vector, num_groups,
            num_hidden, length, d, block, training,
        )  # fmt: skip
    else:
        d_a = _fc1_backward(
            a, d_reduced, ln_unit, fc1, scatter, d_fc1, num_samples, num_groups, num_hidden, length, d, block, training
        )
        if has_norm:
            if training:
                own = tl.zeros((d,), tl.float32)
                for k in range(num_samples):
                    own += tl.load(scatter + (k * num_groups + g) * d * d + i * (d + 1))
                d_a -= 2 * a * by_scale * (own / (tl.maximum(length - 1, 1) / SCATTER_UNIT))
            d_a += tl.load(d_affine + 2 * g * d + i)
            d_b = tl.load(d_affine + (2 * g + 1) * d + i)
            tl.store(d_norm_weight + c, (d_a - tl.load(norm_mean + c).to(tl.float32) * d_b) * rstd)
            tl.store(d_norm_bias + c, d_b)
        if g == 0:
            tl.store(d_theta, tl.sum(tl.load(d_scalars + 3 * groups, mask=there, other=0.0), 0))
            if has_alpha:
                tl.store(d_alpha, tl.sum(tl.load(d_scalars + 3 * groups + 1, mask=there, other=0.0), 0))


@triton.jit
def _dx_coefficients(
    n, a, by_scale, d_reduced, ln_unit, fc1, sample_means, center, d_sigma, k_matrix, k_vector, num_groups,
    num_hidden, length, d: tl.constexpr, block: tl.constexpr, training: tl.constexpr,
):  # fmt: skip
    """Store K and k of the group in sample n."""
    g, i = tl.program_id(0), tl.arange(0, d)
    total = tl.zeros((block, d), tl.float32)
    for start in range(0, num_hidden, block):
        h = start + tl.arange(0, block)
        there = h < num_hidden
        dh = tl.load(d_reduced + n * num_hidden + h, mask=there, other=0.0) / tl.load(ln_unit + n)
        tile = h[:, None] * num_groups * d + g * d + i[None, :]
        total += dh[:, None] * tl.load(fc1 + tile, mask=there[:, None], other=0.0).to(tl.float32)
    diagonal = 2 * a * a * (tl.sum(total, 0) - by_scale) / tl.maximum(length - 1, 1)
    diagonal = tl.where(length == 1, 0.0, diagonal)  # x = m there
    row = n * num_groups + g
    m = tl.load(sample_means + row * d + i)
    if training:
        square = i[:, None] * d + i[None, :]
        ds = tl.load(d_sigma + g * d * d + square)
        mu = tl.load(center + g * d + i)
        # of one position, K x - k = K (m - mu) is in k alone
        mu = tl.where(length == 1, mu - m, mu)
        tl.store(k_vector + row * d + i, tl.sum(mu[:, None] * ds, 0) + diagonal * m)
        ds = tl.where(length == 1, 0.0, ds)
        tl.store(k_matrix + row * d * d + square, ds + identity(d) * diagonal[:, None])
    else:
        tl.store(k_matrix + row * d + i, diagonal)
        tl.store(k_vector + row * d + i, diagonal * m)


@triton.jit
def _fc1_backward(
    a, d_reduced, ln_unit, fc1, scatter, d_fc1, num_samples, num_groups, num_hidden, length, d: tl.constexpr,
    block: tl.constexpr, training: tl.constexpr,
):  # fmt: skip
    """Store the gradient of W1, the group's columns; return what a gets."""
    g, i = tl.program_id(0), tl.arange(0, d)
    d_a = tl.zeros((d,), tl.float32)
    for start in range(0, num_hidden, block):
        h = start + tl.arange(0, block)
        there = h < num_hidden
        total = tl.zeros((block, d), tl.float32)
        for n in range(num_samples):
            row = n * num_groups + g
            index = row * d * d + i * (d + 1) if training else row * d + i
            v = tl.load(scatter + index) / (tl.maximum(length - 1, 1) / SCATTER_UNIT) / tl.load(ln_unit + n)
            total += tl.load(d_reduced + n * num_hidden + h, mask=there, other=0.0)[:, None] * v[None, :]
        tile = h[:, None] * num_groups * d + g * d + i[None, :]
        w1 = tl.load(fc1 + tile, mask=there[:, None], other=0.0).to(tl.float32)
        d_a += 2 * a * tl.sum(w1 * total, 0)
        tl.store(d_fc1 + tile, total * (a * a)[None, :], mask=there[:, None])
    return d_a
