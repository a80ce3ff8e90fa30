"""The Triton kernels of the small matrices; ``triton_coefficients`` says what each computes and starts them.

All products are as exact as float32, whatever the TF32 switches say. Letters as in ``channel_equilibrium``; a pointer
that an option switches off is not read. Indices: n a sample, g a group, i and j its channels, h a hidden unit.
"""

import triton
import triton.language as tl


@triton.jit
def _affine(mean, variance, weight, bias, eps, channels, has_norm: tl.constexpr, has_weight: tl.constexpr):
    """Return a and b of the norm x = a z + b, and a / weight."""
    rstd = tl.full(channels.shape, 1.0, tl.float32)
    shift = tl.zeros(channels.shape, tl.float32)
    scale = rstd
    if has_norm:
        rstd = 1 / tl.sqrt_rn(tl.load(variance + channels).to(tl.float32) + eps)
        scale = rstd
        if has_weight:
            scale = tl.load(weight + channels).to(tl.float32) * rstd
            shift = tl.load(bias + channels).to(tl.float32)
        shift -= tl.load(mean + channels).to(tl.float32) * scale
    return scale, shift, rstd


@triton.jit
def _layer_norm_moments(hidden, num_hidden, max_hidden: tl.constexpr, eps: tl.constexpr):
    """Return mean and reciprocal deviation of a sample's hidden units."""
    units = tl.arange(0, max_hidden)
    there = units < num_hidden
    values = tl.load(hidden + units, mask=there, other=0.0)
    mean = tl.sum(values, 0) / num_hidden
    centered = tl.where(there, values - mean, 0.0)
    return mean, 1 / tl.sqrt_rn(tl.sum(centered * centered, 0) / num_hidden + eps)


@triton.jit
def _dot(left, right):
    # three TF32 products are as exact as float32; IEEE products of 64 x 64 would not fit into the registers
    return tl.dot(left, right, input_precision='ieee' if left.shape[0] <= 16 else 'tf32x3')


@triton.jit
def _eye(d: tl.constexpr):
    return (tl.arange(0, d)[:, None] == tl.arange(0, d)[None, :]).to(tl.float32)


@triton.jit
def batch_kernel(
    sample_means, scatter, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, eps, center, mean, covariance,
    normalized, trace, whitening, sums, num_samples, num_groups, length, d: tl.constexpr, num_iterations: tl.constexpr,
    has_norm: tl.constexpr, has_weight: tl.constexpr,
):  # fmt: skip
    """Sigma of group g from the moments of the samples, and P_T; and what the group adds to the means that s needs."""
    g = tl.program_id(0)
    i = tl.arange(0, d)
    square = i[:, None] * d + i[None, :]
    a, b, _ = _affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, g * d + i, has_norm, has_weight)
    common = tl.zeros((d,), tl.float32)
    variances = tl.zeros((d,), tl.float32)
    squares = tl.zeros((d,), tl.float32)
    for n in range(num_samples):
        row = n * num_groups + g
        m = tl.load(sample_means + row * d + i)
        common += m
        squares += (a * m + b) * (a * m + b)
        variances += tl.load(scatter + row * d * d + i * (d + 1))
    common /= num_samples
    sigma = tl.zeros((d, d), tl.float32)
    for n in range(num_samples):
        row = n * num_groups + g
        between = tl.load(sample_means + row * d + i) - common
        sigma += tl.load(scatter + row * d * d + square) / length + between[:, None] * between[None, :]
    sigma /= num_samples
    tl.store(center + g * d + i, common)
    tl.store(mean + g * d + i, a * common + b)
    tl.store(covariance + g * d * d + square, sigma)
    eye = _eye(d)
    sigma = a[:, None] * sigma * a[None, :] + eps * eye
    total = tl.sum(tl.sum(sigma * eye, 1), 0)
    y = sigma / total
    tl.store(normalized + g * d * d + square, y)
    tl.store(trace + g, total)
    tl.store(sums + 2 * g, tl.sum(variances * a * a, 0) / tl.maximum(length - 1, 1))
    tl.store(sums + 2 * g + 1, tl.sum(squares, 0))
    p = 1.5 * eye - 0.5 * y
    step = p
    for _ in range(num_iterations - 1):
        y = _dot(y, step)
        step = 1.5 * eye - 0.5 * _dot(p, y)
        p = _dot(step, p)
    tl.store(whitening + g * d * d + square, p)


@triton.jit
def hidden_kernel(
    variances, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, fc1, hidden, num_channels, num_hidden,
    length, d: tl.constexpr, units: tl.constexpr, block: tl.constexpr, from_scatter: tl.constexpr,
    has_norm: tl.constexpr, has_weight: tl.constexpr,
):  # fmt: skip
    """W1 v_n, a block of hidden units a program. ``variances`` holds scatters, or their diagonals alone."""
    h = tl.program_id(0) * units + tl.arange(0, units)
    n = tl.program_id(1)
    total = tl.zeros((units, block), tl.float32)
    for start in range(0, num_channels, block):
        c = start + tl.arange(0, block)
        there = c < num_channels
        c = tl.where(there, c, 0)
        a, _, _ = _affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm, has_weight)
        index = n * num_channels + c
        if from_scatter:
            index = index // d * d * d + c % d * (d + 1)
        v = a * a * tl.load(variances + index) / tl.maximum(length - 1, 1)
        v = tl.where(there, v, 0.0)
        weight = tl.load(fc1 + h[:, None] * num_channels + c[None, :], mask=(h < num_hidden)[:, None], other=0.0)
        total += weight.to(tl.float32) * v[None, :]
    tl.store(hidden + n * num_hidden + h, tl.sum(total, 1), mask=h < num_hidden)


@triton.jit
def mixture_kernel(
    hidden, sums, whitening, running_scale, norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, alpha, theta,
    ln_weight, ln_bias, fc2, matrix, constant, gate, batch_scale, whitening_used, num_samples, num_groups, num_hidden,
    d: tl.constexpr, max_groups: tl.constexpr, max_hidden: tl.constexpr, block: tl.constexpr, ln_eps: tl.constexpr,
    rounding: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr, has_weight: tl.constexpr,
    has_alpha: tl.constexpr,
):  # fmt: skip
    """The gate of the group's channels in sample n, s, and M_{n,g} with the norm folded in."""
    g, n = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, d)
    c = g * d + i
    square = i[:, None] * d + i[None, :]
    hidden_row = hidden + n * num_hidden
    ln_mean, ln_rstd = _layer_norm_moments(hidden_row, num_hidden, max_hidden, ln_eps)
    logits = tl.zeros((d, block), tl.float32)
    for start in range(0, num_hidden, block):
        h = start + tl.arange(0, block)
        there = h < num_hidden
        normed = (tl.load(hidden_row + h, mask=there, other=0.0) - ln_mean) * ln_rstd
        normed = normed * tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
        normed += tl.load(ln_bias + h, mask=there, other=0.0).to(tl.float32)
        rectified = tl.where(normed < 0, 0.0, normed)
        weight = tl.load(fc2 + c[:, None] * num_hidden + h[None, :], mask=there[None, :], other=0.0)
        logits += weight.to(tl.float32) * rectified[None, :]
    gates = 1 / (1 + tl.exp(-tl.sum(logits, 1)))
    if training:
        groups = tl.arange(0, max_groups)
        there = groups < num_groups
        count = num_samples * num_groups * d
        mean_variance = tl.sum(tl.load(sums + 2 * groups, mask=there, other=0.0), 0) / count
        mean_square = tl.sum(tl.load(sums + 2 * groups + 1, mask=there, other=0.0), 0) / count
        # without spatial variance there is nothing to equalize: s = 1
        s = tl.sqrt_rn(tl.where(mean_variance > rounding * mean_square, mean_variance, 1.0))
    else:
        s = tl.load(running_scale).to(tl.float32)
    p = tl.load(whitening + g * d * d + square).to(tl.float32)
    lambda_logit = tl.load(theta).to(tl.float32)
    eye = _eye(d)
    reweighting = gates / (s * (1 + tl.exp(lambda_logit)))
    m = p / (1 + tl.exp(-lambda_logit)) + eye * reweighting[:, None]
    if has_alpha:
        m = eye + tl.load(alpha).to(tl.float32) * (m - eye)
    if has_norm:
        a, b, _ = _affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm, has_weight)
        tl.store(constant + (n * num_groups + g) * d + i, tl.sum(m * b[None, :], 1))
        m = m * a[None, :]
    tl.store(matrix + (n * num_groups + g) * d * d + square, m)
    tl.store(gate + n * num_groups * d + c, gates)
    if n == 0:
        if not training:  # a copy: the running values may move before the backward pass
            tl.store(whitening_used + g * d * d + square, p)
        if g == 0:
            tl.store(batch_scale, s)


@triton.jit
def mixture_backward_kernel(
    d_matrix, d_constant, whitening, batch_scale, gate, normalized, trace, covariance, norm_mean, norm_variance,
    norm_weight, norm_bias, norm_eps, alpha, theta, d_logits, d_affine, d_scalars, d_sigma, num_samples, num_groups,
    length, d: tl.constexpr, num_iterations: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr,
    has_weight: tl.constexpr, has_alpha: tl.constexpr,
):  # fmt: skip
    """From dM to the gate's logits, theta, alpha, a and b, and through P_T and Sigma to the covariance of z."""
    g = tl.program_id(0)
    i = tl.arange(0, d)
    c = g * d + i
    square = i[:, None] * d + i[None, :]
    eye = _eye(d)
    a, b, _ = _affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm, has_weight)
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
        equalizer = lambda_ * p + eye * reweighting[:, None]
        if has_norm:
            m = eye + share * (equalizer - eye) if has_alpha else equalizer
            dc = tl.load(d_constant + row * d + i)
            d_a += tl.sum(m * dm, 0)
            d_b += tl.sum(m * dc[:, None], 0)
            dm = dm * a[None, :] + dc[:, None] * b[None, :]
        if has_alpha:
            d_alpha += tl.sum(dm * (equalizer - eye), 1)
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
    eye = _eye(d)
    y = normalized
    dy = 0.5 * (d_whitening + tl.trans(d_whitening))
    p = 1.5 * eye - 0.5 * y
    dp = -0.5 * dy
    step, d_step = p, dp
    for _ in range(num_iterations - 1):
        dy = _dot(y, d_step) + _dot(dy, step)
        y = _dot(y, step)
        d_step = -0.5 * (_dot(p, dy) + _dot(dp, y))
        step = 1.5 * eye - 0.5 * _dot(p, y)
        dp = _dot(step, dp) + _dot(d_step, p)
        p = _dot(step, p)
    return dp


@triton.jit
def hidden_backward_kernel(
    d_logits, hidden, ln_weight, ln_bias, fc2, d_normed, d_fc2, num_samples, num_channels, num_hidden,
    units: tl.constexpr, block: tl.constexpr, max_hidden: tl.constexpr, ln_eps: tl.constexpr,
):  # fmt: skip
    """Through W2 and ReLU: for sample n the gradient before ReLU; in the program after the last sample that of W2."""
    h = tl.program_id(0) * units + tl.arange(0, units)
    n = tl.program_id(1)
    there = h < num_hidden
    weight = tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(ln_bias + h, mask=there, other=0.0).to(tl.float32)
    if n < num_samples:
        mean, rstd = _layer_norm_moments(hidden + n * num_hidden, num_hidden, max_hidden, ln_eps)
        normed = (tl.load(hidden + n * num_hidden + h, mask=there, other=0.0) - mean) * rstd * weight + bias
        total = tl.zeros((block, units), tl.float32)
        for start in range(0, num_channels, block):
            c = start + tl.arange(0, block)
            dl = tl.load(d_logits + n * num_channels + c, mask=c < num_channels, other=0.0)
            inside = (c < num_channels)[:, None] & there[None, :]
            total += dl[:, None] * tl.load(fc2 + c[:, None] * num_hidden + h[None, :], mask=inside, other=0.0)
        tl.store(d_normed + n * num_hidden + h, tl.where(normed <= 0, 0.0, tl.sum(total, 0)), mask=there)
    else:
        for start in range(0, num_channels, block):
            c = start + tl.arange(0, block)
            total = tl.zeros((block, units), tl.float32)
            for k in range(num_samples):
                mean, rstd = _layer_norm_moments(hidden + k * num_hidden, num_hidden, max_hidden, ln_eps)
                normed = (tl.load(hidden + k * num_hidden + h, mask=there, other=0.0) - mean) * rstd * weight + bias
                dl = tl.load(d_logits + k * num_channels + c, mask=c < num_channels, other=0.0)
                total += dl[:, None] * tl.where(normed < 0, 0.0, normed)[None, :]
            inside = (c < num_channels)[:, None] & there[None, :]
            tl.store(d_fc2 + c[:, None] * num_hidden + h[None, :], total, mask=inside)


@triton.jit
def _layer_norm_backward(d_normed, hidden, ln_weight, n, num_hidden, max_hidden: tl.constexpr, ln_eps: tl.constexpr):
    """Return LayerNorm's moments in sample n, and the two means that its backward pass subtracts."""
    mean, rstd = _layer_norm_moments(hidden + n * num_hidden, num_hidden, max_hidden, ln_eps)
    h = tl.arange(0, max_hidden)
    there = h < num_hidden
    dn = tl.load(d_normed + n * num_hidden + h, mask=there, other=0.0)
    dn = dn * tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
    direction = (tl.load(hidden + n * num_hidden + h, mask=there, other=0.0) - mean) * rstd
    return mean, rstd, tl.sum(dn, 0) / num_hidden, tl.sum(dn * direction, 0) / num_hidden


@triton.jit
def gate_backward_kernel(
    d_normed, hidden, ln_weight, fc1, sample_means, variances, center, d_sigma, d_affine, d_scalars, sums, batch_scale,
    norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, symmetric, constant, d_norm_weight, d_norm_bias,
    d_alpha, d_theta, d_fc1, d_ln_weight, d_ln_bias, num_samples, num_groups, num_hidden, length, d: tl.constexpr,
    max_groups: tl.constexpr, max_hidden: tl.constexpr, block: tl.constexpr, ln_eps: tl.constexpr,
    rounding: tl.constexpr, training: tl.constexpr, has_norm: tl.constexpr, has_weight: tl.constexpr,
    has_alpha: tl.constexpr,
):  # fmt: skip
    """Through LayerNorm and W1 to v: for sample n what dx needs; in the program after the last, the parameters."""
    g, n = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, d)
    c = g * d + i
    a, _, rstd_norm = _affine(norm_mean, norm_variance, norm_weight, norm_bias, norm_eps, c, has_norm, has_weight)
    groups = tl.arange(0, max_groups)
    there_g = groups < num_groups
    by_scale = 0.0
    if training:  # s = sqrt(mean(v))
        count = num_samples * num_groups * d
        mean_variance = tl.sum(tl.load(sums + 2 * groups, mask=there_g, other=0.0), 0) / count
        mean_square = tl.sum(tl.load(sums + 2 * groups + 1, mask=there_g, other=0.0), 0) / count
        towards = tl.sum(tl.load(d_scalars + 3 * groups + 2, mask=there_g, other=0.0), 0)
        s = tl.load(batch_scale)
        by_scale = tl.where(mean_variance > rounding * mean_square, towards / (2 * count * s * s), 0.0)
    if n < num_samples:
        mean, rstd, mean_1, mean_2 = _layer_norm_backward(
            d_normed, hidden, ln_weight, n, num_hidden, max_hidden, ln_eps
        )
        total = tl.zeros((block, d), tl.float32)
        for start in range(0, num_hidden, block):
            h = start + tl.arange(0, block)
            there = h < num_hidden
            dn = tl.load(d_normed + n * num_hidden + h, mask=there, other=0.0)
            dn = dn * tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
            direction = (tl.load(hidden + n * num_hidden + h, mask=there, other=0.0) - mean) * rstd
            d_hidden = tl.where(there, rstd * (dn - mean_1 - direction * mean_2), 0.0)
            weight = tl.load(fc1 + h[:, None] * num_groups * d + c[None, :], mask=there[:, None], other=0.0)
            total += d_hidden[:, None] * weight.to(tl.float32)
        d_variance = tl.sum(total, 0) - by_scale
        d_diagonal = 2 * a * a * d_variance / tl.maximum(length - 1, 1)
        row = n * num_groups + g
        m = tl.load(sample_means + row * d + i)
        if training:
            square = i[:, None] * d + i[None, :]
            ds = tl.load(d_sigma + g * d * d + square)
            full = ds + _eye(d) * d_diagonal[:, None]
            full = tl.where(length == 1, 0.0, full)  # x = m there
            between = m - tl.load(center + g * d + i)
            tl.store(symmetric + row * d * d + square, full)
            by_means = tl.sum(between[:, None] * ds, 0) - tl.sum(full * m[None, :], 1)
            tl.store(constant + row * d + i, by_means)
        else:
            tl.store(symmetric + row * d + i, d_diagonal)
            tl.store(constant + row * d + i, -d_diagonal * m)
    else:
        d_a = tl.zeros((d,), tl.float32)
        for start in range(0, num_hidden, block):
            h = start + tl.arange(0, block)
            there = h < num_hidden
            total = tl.zeros((block, d), tl.float32)
            total_weight = tl.zeros((block,), tl.float32)
            total_bias = tl.zeros((block,), tl.float32)
            for k in range(num_samples):
                mean, rstd, mean_1, mean_2 = _layer_norm_backward(
                    d_normed, hidden, ln_weight, k, num_hidden, max_hidden, ln_eps
                )
                d_out = tl.load(d_normed + k * num_hidden + h, mask=there, other=0.0)
                dn = d_out * tl.load(ln_weight + h, mask=there, other=0.0).to(tl.float32)
                direction = (tl.load(hidden + k * num_hidden + h, mask=there, other=0.0) - mean) * rstd
                d_hidden = tl.where(there, rstd * (dn - mean_1 - direction * mean_2), 0.0)
                index = (k * num_groups + g) * d + i
                if training:
                    index = (k * num_groups + g) * d * d + i * (d + 1)
                total += d_hidden[:, None] * tl.load(variances + index)[None, :]
                total_weight += tl.where(there, d_out * direction, 0.0)
                total_bias += d_out
            total /= tl.maximum(length - 1, 1)
            tile = h[:, None] * num_groups * d + c[None, :]
            weight = tl.load(fc1 + tile, mask=there[:, None], other=0.0).to(tl.float32)
            d_a += 2 * a * tl.sum(weight * total, 0)
            tl.store(d_fc1 + tile, total * (a * a)[None, :], mask=there[:, None])
            if g == 0:
                tl.store(d_ln_weight + h, total_weight, mask=there)
                tl.store(d_ln_bias + h, total_bias, mask=there)
        if has_norm:
            if training:
                own = tl.zeros((d,), tl.float32)
                for k in range(num_samples):
                    own += tl.load(variances + (k * num_groups + g) * d * d + i * (d + 1))
                d_a -= 2 * a * by_scale * own / tl.maximum(length - 1, 1)
            d_a += tl.load(d_affine + 2 * g * d + i)
            d_b = tl.load(d_affine + (2 * g + 1) * d + i)
            if has_weight:
                tl.store(d_norm_weight + c, (d_a - tl.load(norm_mean + c).to(tl.float32) * d_b) * rstd_norm)
                tl.store(d_norm_bias + c, d_b)
        if g == 0:
            tl.store(d_theta, tl.sum(tl.load(d_scalars + 3 * groups, mask=there_g, other=0.0), 0))
            if has_alpha:
                tl.store(d_alpha, tl.sum(tl.load(d_scalars + 3 * groups + 1, mask=there_g, other=0.0), 0))
