"""The method once more, as slow and as plainly as possible: NumPy, float64, a loop for every sum over channels.

Nothing here imports the package. ``local`` is ``[n, C]`` local samples, ``means`` ``[N, C]`` image samples,
``target`` ``[N]`` or ``[N, D]`` numbers.
"""

import numpy as np

MAX_CORRELATION = 0.999
RIDGE = 1e-3


def centred(samples):
    samples = np.asarray(samples, dtype=np.float64)
    samples = samples - samples.mean(0)
    return samples - samples.mean(0)


def covariance(first, second):
    return float((centred(first) * centred(second)).mean())


def correlation(first, second):
    return covariance(first, second) / np.sqrt(covariance(first, first) * covariance(second, second))


def correlation_matrix(samples):
    columns = [y / np.sqrt(y @ y) for y in centred(samples).T]
    return np.array([[a @ b for b in columns] for a in columns])


def information(squared):
    """−½ ln(1 − ρ²) with |ρ| at most 0.999."""
    return -0.5 * np.log(1 - min(max(squared, 0.0), MAX_CORRELATION**2))


def live_channels(local, means):
    """Indices of the channels whose variance is finite and not negligible in both kinds of sample."""
    live = np.ones(local.shape[1], bool)
    for samples in (local, means):
        with np.errstate(invalid="ignore"):
            variance = (centred(samples) ** 2).mean(0)
        finite = np.isfinite(variance)
        live &= finite
        live[finite] &= variance[finite] > 1e-12 * np.median(variance[finite])
    return np.flatnonzero(live)


def input_capture(local):
    power = [covariance(y, y) for y in local.T]
    return np.array([0.5 * np.log(1 + p / np.median(power)) for p in power])


def peer_overlap(local):
    channels = local.shape[1]
    if channels < 2:
        return np.full(channels, np.nan)
    shares, rho = np.zeros(channels), correlation_matrix(local)
    for i in range(channels):
        for j in range(channels):
            if j != i:
                shares[i] += information(rho[i, j] ** 2) / (channels - 1)
    return shares


def margins(logits, labels):
    """z_correct − max of the others, image by image."""
    logits = np.asarray(logits, dtype=np.float64)
    return np.array(
        [z[label] - max(z[k] for k in range(len(z)) if k != label) for z, label in zip(logits, labels, strict=True)]
    )


def residual(values, target):
    """What least squares on the target (with intercept) leaves of ``[N]`` or ``[N, C]`` values."""
    design = np.column_stack([np.ones(len(values)), centred(target)])
    return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]


def class_residual(values, labels):
    """What the class means leave of the values."""
    left = np.array(values, dtype=np.float64)
    for k in np.unique(labels):
        left[labels == k] -= left[labels == k].mean(0)
    return left


def task_information(means, target):
    return np.array([information(correlation(y, target) ** 2) for y in means.T])


def pair_information(means, target):
    """``[C, C]``, from the R² of two regressors; the correlation of the two is clipped like any other."""
    channels = means.shape[1]
    r, rho = [correlation(y, target) for y in means.T], correlation_matrix(means)
    pairs = np.zeros((channels, channels))
    for i in range(channels):
        for j in range(channels):
            if j != i:
                q = np.clip(rho[i, j], -MAX_CORRELATION, MAX_CORRELATION)
                pairs[i, j] = information((r[i] ** 2 + r[j] ** 2 - 2 * r[i] * r[j] * q) / (1 - q**2))
    return pairs


def task_information_from_residuals(means, left):
    """From the share of a channel's variance that the target does not explain."""
    return np.array([information(1 - (e**2).mean() / covariance(y, y)) for y, e in zip(means.T, left.T, strict=True)])


def pair_information_from_residuals(means, left):
    """Wilks' Λ of two channels: generalised variance within over generalised variance in total."""
    channels = means.shape[1]
    scaled = centred(means) / centred(means).std(0)
    left = left / centred(means).std(0)
    pairs = np.zeros((channels, channels))
    for i in range(channels):
        for j in range(channels):
            if j != i:
                total = scaled[:, [i, j]].T @ scaled[:, [i, j]] / len(scaled)
                within = left[:, [i, j]].T @ left[:, [i, j]] / len(left)
                pairs[i, j] = information(1 - np.linalg.det(within) / np.linalg.det(total))
    return pairs


def target_excess(means, single, pairs, candidates=50, partners=10):
    """Mean over the best partners of I(T; i, j) − max(I(T; i), I(T; j))."""
    channels = means.shape[1]
    result, rho = np.full(channels, np.nan), correlation_matrix(means)
    for i in range(channels):
        peers = [j for j in range(channels) if j != i]
        if not peers:
            continue
        peers.sort(key=lambda j: -(rho[i, j] ** 2))
        excess = [pairs[i, j] - max(single[i], single[j]) for j in peers[:candidates]]
        result[i] = np.mean(sorted(excess, reverse=True)[:partners])
    return result


def ridge_r2(rho, i, peers, ridge=RIDGE):
    """Coefficients on some peers, and the share of channel i's variance that they explain."""
    among, toward = rho[np.ix_(peers, peers)], rho[peers, i]
    beta = np.linalg.solve(among + ridge * np.eye(len(peers)), toward)
    return beta, float(2 * beta @ toward - beta @ among @ beta)


def peer_reconstruction(local, ridge=RIDGE):
    """Coefficients ``[C, C]``, R², hull size: one solve for every channel and for every prefix of its peers."""
    rho = correlation_matrix(local)
    channels = len(rho)
    coefficients, r2, size = np.zeros((channels, channels)), np.zeros(channels), np.full(channels, np.nan)
    for i in range(channels):
        peers = [j for j in range(channels) if j != i]
        if not peers:
            continue
        coefficients[i, peers], explained = ridge_r2(rho, i, peers, ridge)
        r2[i] = min(max(explained, 0.0), 1.0)
        nearest = sorted(peers, key=lambda j: -abs(rho[i, j]))[:10]
        for k in range(1, len(nearest) + 1):
            size[i] = k
            if ridge_r2(rho, i, nearest[:k], ridge)[1] >= 0.95 * r2[i]:
                break
    return coefficients, r2, size


def layer_columns(local, means, target, labels=None):
    """Every column of one layer's table; by class means where ``labels`` are given instead of a target."""
    columns = {}
    channels = local.shape[1]
    live = live_channels(local, means)
    local, means = np.float64(local[:, live]), np.float64(means[:, live])
    if labels is None:
        single, pairs = task_information(means, target), pair_information(means, target)
    else:
        left = class_residual(means, labels)
        single, pairs = task_information_from_residuals(means, left), pair_information_from_residuals(means, left)
    _, r2, size = peer_reconstruction(local)
    found = {
        "input_capture": input_capture(local),
        "peer_overlap": peer_overlap(local),
        "task_information": single,
        "target_excess": target_excess(means, single, pairs),
        "peer_r2": r2,
        "hull_size": size,
        "hull_score": r2 / size,
    }
    for name, values in found.items():
        columns[name] = np.full(channels, np.nan)
        columns[name][live] = values
    return columns
