"""Randomized smoothing: certify any classifier `images -> logits`.

    g = Smooth(f, num_classes=10, sigma=0.25)
    g.certify(images, labels)  # CERTIFY: classes and l2 radii
    g.predict(images)  # PREDICT: classes, or ABSTAIN
    cache = g.certify_and_cache(images, labels)  # also what f predicted
    Smooth(changed, 10, 0.25).certify_incremental(images, cache, n_p=100)  # IRS

This file stands alone. Pixels lie in [0, 1], sigma and radii are in their units;
noise is added before any normalisation.

    paper     here        meaning
    f, f^P    classifier  base, changed: images (B, C, H, W) -> logits (B, k)
    g         Smooth      g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I)
    c_A       selected    class chosen on n0 samples; the bounds use others
    n_A, n_B  n_a, n_b    votes of n for c_A, for the most counted other class
    p_A, p_B  p_a, p_b    bounds of P[f(x + eps) = c], c_A from below, others above
    n_p       n_p         samples of f^P per image
    zeta      zeta        upper bound of P[f(x + eps) != f^P(x + eps)]
    R         radius      g is constant within this l2 distance of x
"""

import csv
import functools
import hashlib
import math
import time
from datetime import timedelta
from typing import NamedTuple

import torch
from scipy.special import betaincinv, ndtri, roots_legendre
from torch import Tensor, nn

ABSTAIN = -1
CHUNK = 100  # samples drawn at a time
_float64 = functools.partial(torch.as_tensor, dtype=torch.float64, device="cpu")
MARGIN = 1e-12  # above rounding: 5e-13 of a bound, 1e-15 sigma


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- bounds and radii ----
def lower_confidence_bound(k, n, alpha):
    """P[bound <= true probability] >= 1 - alpha (Clopper-Pearson, one-sided), from k
    successes in n trials. Numbers give a float, arrays a tensor."""
    k, n, alpha = (_float64(x).numpy() for x in (k, n, alpha))
    valid = (alpha > 0) & (alpha < 1) & (k >= 0) & (k <= n) & (n >= 1)
    require(valid.all(), "0 < alpha < 1, 0 <= k <= n and n >= 1 must hold")
    margin = MARGIN * (n / 1e6).clip(min=1)  # errors grow
    quantile = betaincinv(k, n - k + 1, alpha)  # nan where k = 0
    bound = _float64(quantile * (1 - margin)).nan_to_num(0)
    return bound if bound.ndim else bound.item()


def upper_confidence_bound(k, n, alpha):
    """The same from above: P[bound >= true probability] >= 1 - alpha."""
    low = lower_confidence_bound(_float64(n) - _float64(k), n, alpha)
    bound = (1 + 2**-52 - _float64(low)).clip(max=1)  # covers rounding
    return bound if bound.ndim else bound.item()


def certified_radius(p_a, sigma, p_b=None):
    """R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), in l2 (ARQ, Theorem 2.1).
    0 where nothing is certified. Without p_b, R = sigma Phi^-1(p_A), as published."""
    require(0 < sigma < math.inf, f"sigma must be positive, not {sigma}")
    p_b = 1 - _float64(p_a) if p_b is None else p_b
    p = torch.stack(torch.broadcast_tensors(_float64(p_a), _float64(p_b)))
    require(p.equal(p.clip(0, 1)), "probabilities must lie between 0 and 1")
    quantile_a, quantile_b = _float64(ndtri(p.numpy()))
    radius = sigma / 2 * (quantile_a - quantile_b - MARGIN).clip(min=0)
    radius = radius.nan_to_num(0, math.inf)  # inf - inf
    return radius if radius.ndim else radius.item()


# ---- noise ----
@functools.cache
def noise_table(sigma, levels, device):
    """P[m] = Phi((m + 1/2) / (levels sigma)) - Phi((m - 1/2) / (levels sigma)):
    the lowest m; 2^62 P[<= m]; m by 16 of 62 random bits, nan where the others decide."""
    lowest = -math.ceil(9.1 * levels * sigma)  # less than 2^-62 lies beyond
    m = torch.arange(lowest, 1 - lowest)
    # The density's integral: 50 times as precise as differences of Phi.
    points, weights = map(torch.from_numpy, roots_legendre(10))
    t = (m[:, None] + points / 2) / (levels * sigma)
    p = (-t * t / 2).exp() @ weights
    units = (2**62 * p / p.sum()).round().long()
    units[-lowest] += 2**62 - units.sum()
    ends = units.cumsum(0)
    cells = torch.searchsorted(ends, torch.arange(2**16 + 1) << 46, right=True)
    by_bits = torch.where(cells.diff() == 0, cells[:-1] + lowest, math.nan).float()
    return lowest, ends.to(device), by_bits.to(device)


def draw_noise(key, image_id, chunk, shape, device, sigma, levels):
    """m or, without levels, eps (CHUNK, *shape); equal arguments draw equal noise."""
    start = hashlib.sha256(f"{key}|{image_id}".encode()).digest()
    # CPU generators keep 32 bits: chunks count up from start, so none repeats.
    seed = (int.from_bytes(start[:4], "little") + chunk) % 2**32
    generator = torch.Generator(device).manual_seed(seed)
    shape = CHUNK, *shape
    if levels is None:
        return torch.randn(shape, generator=generator, device=device).mul_(sigma)
    lowest, ends, by_bits = noise_table(sigma, levels, device)
    bits = torch.empty(math.prod(shape) // 4, dtype=torch.int64, device=device)
    bits.random_(-(2**63), None, generator=generator)
    high = bits.view(torch.uint16).int()  # four times 16
    m = by_bits.index_select(0, high)
    undecided = m.isnan().nonzero().squeeze(1)
    number = high[undecided].long() << 46
    number += torch.empty_like(number).random_(0, 2**46, generator=generator)
    m[undecided] = (torch.searchsorted(ends, number, right=True) + lowest).float()
    return m.view(shape)


def alpha_after_noise(alpha, n, pixels, sigma, levels=255) -> float:
    """alpha less the total variation of n samples' noise to Gaussian noise; pixels in
    all channels. ValueError if n votes of n then certify nothing."""
    per_pixel = 0.0 if levels is None else levels * sigma * 2**-57 + 2**-50
    error = n * pixels * per_pixel  # measured: at most a third of this
    low = 0.5**n + error
    require(low < alpha < 1, f"{n} samples need alpha in {low:.2g}..1, not {alpha}; take more")
    return alpha - error


# ---- certificates ----
class Certificate(NamedTuple):  # other tools have the first six fields
    idx: int  # the image's id
    label: int
    predict: int  # g's class, or ABSTAIN
    radius: float  # 0 where g abstains
    correct: int  # 1 if predict is the label, else 0
    time: str = ""  # h:mm:ss.ffffff
    selected: int | None = None
    n_a: int | None = None
    n_b: int | None = None
    n: int | None = None  # samples that voted; 0 if skipped
    n0: int | None = None
    sigma: float | None = None
    alpha: float | None = None  # of the bound, after the noise
    levels: int | None = None  # of the noise's grid; none: float noise


class ReplayCache(NamedTuple):
    certificates: list[Certificate]  # of f
    predictions: Tensor  # f's class for each sample (B, n); 0 where skipped
    key: str  # of those samples' noise


class IncrementalCertificate(NamedTuple):  # of f^P
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    method: str  # none, fresh or replayed
    passes: int  # samples of f^P; 0 where f's class is wrong
    zeta: float  # nan unless replayed


class Smooth:
    """The smoothed classifier g of a callable f. num_classes may be None.
    seed, purpose: name the noise; batch_size: samples per forward pass
    levels: pixels are k / levels; None: any pixels and float noise, whose certificates
        hold in real arithmetic only (Voracek, Hein 2023)

    Theorem: certificates hold for all real perturbations, whatever f computes on floats.
    F(z) = f(round(levels z) / levels) is a function of real images; g smooths F.
    As k is integer, round(k + levels eps) = k + m with m = round(levels eps): f votes on
    (k + m) / levels as F on x + eps, and Cohen et al. prove it for F and g.
    The distance of the drawn m in total variation is taken off alpha.
    Assumed: bits are random; f has one answer per input in any batch, as integer networks
    do; float ones may round differently."""

    def __init__(
        self, classifier, num_classes, sigma, seed=0, batch_size=100, purpose="main", levels=255
    ):
        steps = 1 if levels is None else levels * sigma
        fits = 0 < sigma < math.inf and 1 <= steps <= 2**17
        require(fits, f"sigma = {sigma} is not in 1 to {2**17} steps of 1 / {levels}")
        require(batch_size >= 1, f"batch_size = {batch_size} is below 1")
        self.classifier, self.num_classes = classifier, num_classes
        self.sigma, self.batch_size, self.levels = sigma, batch_size, levels
        self.key = f"{seed}|{purpose}"  # equal keys replay the noise
        self.samples = 0  # that f has classified

    def certify(self, images, labels, ids=None, n0=100, n=1000, alpha=0.001):
        """CERTIFY (Cohen et al., ICML 2019, 3.2.2): a Certificate per image.
        With probability 1 - alpha each, g predicts `predict` within `radius`.
        ids (B,) name the noise."""
        cache = self.certify_and_cache(images, labels, ids, n0, n, alpha, False)
        return cache.certificates

    def certify_and_cache(
        self, images, labels, ids=None, n0=100, n=1000, alpha=0.001, skip_wrong=True
    ):
        """CERTIFY for the base classifier f, as a ReplayCache.
        skip_wrong: no samples where c_A is wrong, which adds 0 to every ACR."""
        start = time.monotonic()
        alpha = self._alpha(alpha, images, n)
        ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids)
        # counts0 <- SampleUnderNoise(f, x, n0, sigma)
        counts0 = self.sample_under_noise(images, ids, n0, self.key + "/select")
        labels = torch.as_tensor(labels).cpu()
        valid = labels.shape == ids.shape and not labels.is_floating_point()
        valid = valid and 0 <= labels.min() and labels.max() < self.num_classes
        require(valid, f"{len(ids)} images need as many labels below {self.num_classes}")
        # c_A <- top index in counts0
        selected = counts0.argmax(1)
        # counts <- SampleUnderNoise(f, x, n, sigma)
        sizes = torch.where(selected == labels, n, 0 if skip_wrong else n)
        key = f"{self.key}/estimate{n}"  # another n: other noise
        predictions = self.predictions(images, ids, sizes, key)
        counts = [row.bincount(None, self.num_classes) for row in predictions]
        counts = torch.stack(counts) * (sizes > 0)[:, None]
        n_a = counts.gather(1, selected[:, None]).squeeze(1)
        n_b = counts.scatter(1, selected[:, None], 0).amax(1)
        # p_A <- LowerConfBound(counts[c_A], n, 1 - alpha)
        p_a = lower_confidence_bound(n_a, n, alpha)
        # if p_A > 1/2 return prediction c_A and radius sigma Phi^-1(p_A), else ABSTAIN
        predicted = torch.where(p_a > 0.5, selected, ABSTAIN)
        radius = certified_radius(p_a, self.sigma)
        correct = (predicted == labels).long()
        seconds = timedelta(seconds=(time.monotonic() - start) / len(labels))
        columns = ids, labels.long(), predicted, radius, correct, selected, n_a, n_b, sizes
        rows = zip(*(c.tolist() for c in columns))
        settings = n0, self.sigma, alpha, self.levels
        rows = [Certificate(*row[:5], str(seconds), *row[5:], *settings) for row in rows]
        padded = nn.functional.pad(predictions, (0, n - predictions.shape[1]))
        return ReplayCache(rows, padded, key)

    def predict(self, images, ids=None, n=1000, alpha=0.001):
        """PREDICT (Cohen et al., 3.2.1): classes, each wrong by alpha at most."""
        alpha = self._alpha(alpha / 2, images, n)
        # counts <- SampleUnderNoise(f, x, n, sigma)
        counts = self.sample_under_noise(images, ids, n, self.key + "/predict")
        # c_A, c_B <- top two indices in counts; n_A, n_B <- their counts
        votes, classes = counts.topk(2, dim=1)
        n_a, n_b = votes.T
        # if BinomPValue(n_A, n_A + n_B, 0.5) <= alpha return c_A, else ABSTAIN:
        # then the bound of P[c_A] in c_A, c_B reaches 1/2
        p_a = lower_confidence_bound(n_a, n_a + n_b, alpha)
        return torch.where(p_a >= 0.5, classes[:, 0], ABSTAIN).tolist()

    def certify_incremental(self, images, cache, n_p, alpha_zeta=0.001, gamma=0.99):
        """IRS (Ugare et al., 2024, Algorithm 2): certify a changed f^P by n_p samples.
        With probability 1 - (alpha + alpha_zeta) each, g^P predicts `predict` within `radius`,
        for an f^P chosen without this noise.

        Why, with the fresh branch bounded at alpha? Let p = P[f = c_A]. If p >= gamma, a
        replay's p_A is below p: it fails by zeta alone; a fresh bound fails with alpha. If
        p < gamma, a fresh branch means that f's bound failed; a replay fails by it or zeta."""
        n, base = cache.predictions.shape[1], cache.certificates[0]
        theirs, ours = ((g.sigma, g.levels) for g in (base, self))
        require(theirs == ours, f"sigma, levels: the cache has {theirs}, not {ours}")
        require(n_p <= n, f"n_p = {n_p} exceeds the {n} cached samples")
        alpha_zeta = self._alpha(alpha_zeta, images, n_p)
        # c_A, p_A <- what f was certified with
        rows = [(row.selected, row.label, row.idx, row.n_a) for row in cache.certificates]
        selected, labels, ids, n_a = torch.tensor(rows).T
        right = selected == labels
        p_a = lower_confidence_bound(n_a, n, base.alpha)
        # if p_A < gamma:
        replay = right & (p_a < gamma)
        #     n_delta <- how often f^P and f disagree on the first n_p cached samples
        new = self.predictions(images, ids, replay * n_p, cache.key)
        n_delta = (new != cache.predictions[:, : new.shape[1]]).sum(1)
        #     zeta <- UpperConfBound(n_delta, n_p, alpha_zeta); p <- p_A - zeta
        zeta = upper_confidence_bound(n_delta, n_p, alpha_zeta)
        p = p_a - zeta
        # else:
        fresh = right & ~replay
        #     counts <- SampleUnderNoise(f^P, x, n_p, sigma), on fresh noise
        new = self.predictions(images, ids, fresh * n_p, cache.key + "/fresh")
        #     p <- LowerConfBound(counts[c_A], n_p, alpha)
        votes = (new == selected[:, None]).sum(1)
        p = p.where(replay, lower_confidence_bound(votes, n_p, base.alpha))
        # if p > 1/2 return prediction c_A and radius sigma Phi^-1(p), else ABSTAIN
        radius = certified_radius((right * p).clamp(min=0), self.sigma)
        predicted = torch.where(radius > 0, selected, ABSTAIN)
        columns = [ids, labels, predicted, radius, (radius > 0).long(), fresh + 2 * replay]
        columns += [right * n_p, zeta.where(replay, math.nan)]
        columns = [column.tolist() for column in columns]
        columns[5] = [["none", "fresh", "replayed"][i] for i in columns[5]]
        return [IncrementalCertificate(*row) for row in zip(*columns)]

    def _alpha(self, alpha, images, n):
        pixels = math.prod(getattr(images, "shape", ())[1:])
        return alpha_after_noise(alpha, n, pixels, self.sigma, self.levels)

    def sample_under_noise(self, images, ids, n, key):
        """Counts (B, classes) of f's predictions on n noisy copies."""
        require(n >= 1, f"{n} samples select no class")
        sizes = torch.full((len(images),), n)
        predictions = self.predictions(images, ids, sizes, key)
        return torch.stack([row.bincount(None, self.num_classes) for row in predictions])

    @torch.inference_mode()
    def predictions(self, images, ids, sizes, key):
        """f's classes of sizes[i] copies of images[i], then zeros: (B, max size)."""
        is_batch = isinstance(images, Tensor) and images.ndim == 4 and images.numel()
        require(is_batch, "images must be a tensor (B, C, H, W), not empty")
        valid = images.is_floating_point() and images.equal(images.clamp(0, 1))
        require(valid, "images must be floats in [0, 1]; divide 8-bit ones by 255")
        levels = self.levels or 1  # float noise has no grid
        k = images if self.levels is None else (images.float() * levels).round()
        near = (images - k / levels).abs().max() < 2**-22
        require(near, f"off the grid: round images to k / {levels}")
        ids = torch.arange(len(images)) if ids is None else torch.as_tensor(ids)
        named = ids.shape == ids.unique().shape == images.shape[:1]
        named = named and not ids.is_floating_point()
        require(named, f"{len(images)} images need as many different ids, integers")
        classes, rest = [torch.arange(0)], []
        for pixels, image_id, size in zip(k, ids.tolist(), sizes.tolist()):
            for chunk in range(math.ceil(size / CHUNK)):
                which = key, image_id, chunk, pixels.shape, pixels.device
                noise = draw_noise(*which, self.sigma, self.levels)
                noisy = noise[: size - chunk * CHUNK].add_(pixels).div_(levels)
                *batches, last = torch.cat([*rest, noisy]).split(self.batch_size)
                classes += map(self._classify, batches)
                rest = [last]  # batches span images
        classes += map(self._classify, rest)
        dtype = torch.uint8 if (self.num_classes or 0) <= 2**8 else torch.int32
        classes = torch.cat(classes).to(dtype)
        return nn.utils.rnn.pad_sequence(classes.split(sizes.tolist()), batch_first=True)

    def _classify(self, noisy):
        """f's classes (B,); what is no answer is refused."""
        if isinstance(self.classifier, nn.Module):
            for module in self.classifier.modules():
                require(not module.training, "training mode: call eval()")
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    averaged = module.running_mean is not None
                    require(averaged, "a BatchNorm without running statistics")
            floats = filter(torch.is_floating_point, self.classifier.parameters())
            noisy = noisy.to(next(floats, noisy).dtype)
        logits = self.classifier(noisy)
        self.samples += len(noisy)
        shape = logits.shape if isinstance(logits, Tensor) else type(logits).__name__
        require(shape[:-1] == noisy.shape[:1], f"no logits (B, classes): {shape}")
        self.num_classes = self.num_classes or shape[1]
        same = 1 < shape[1] == self.num_classes
        require(same, f"{self.num_classes} classes, but {shape[1]} logits")
        first, second = logits.topk(2).values.T  # nan is the largest, +inf an answer
        require((first.isfinite() | (first > second)).all(), "logits are not finite")
        return logits.max(1).indices.cpu()


# ---- aggregates and files ----
def two_sided(rows) -> list[Certificate]:
    """The same by Theorem 2.1, p_A, p_B at alpha / 2 each; n_b bounds the runner-up.
    Either radius fails with alpha; the larger of both with 1.5 alpha."""
    certificates = []
    for row in rows:
        counted = isinstance(row, Certificate) and None not in row[:-1]  # but levels
        require(counted, "two-sided radii need counts, sigma and alpha")
        n = max(row.n, 1)
        p_a = lower_confidence_bound(row.n_a, n, row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, n, row.alpha / 2)
        predict = row.selected if p_a > p_b else ABSTAIN
        radius = certified_radius(p_a, row.sigma, p_b)
        row = row._replace(predict=predict, radius=radius)
        certificates.append(row._replace(correct=int(predict == row.label)))
    return certificates


def average_certified_radius(rows) -> float:
    """ACR (ARQ, section 2): the mean of radius * 1[correct]."""
    return acr_difference(rows)[0]


def acr_difference(rows, base_rows=None) -> tuple[float, float | None]:
    """Mean and standard error of radius * 1[correct], less base_rows' if given."""
    radii = _float64([row.radius * row.correct for row in rows])
    if base_rows is not None:
        paired = [row.idx for row in rows] == [row.idx for row in base_rows]
        require(paired, "rows are not of the same images")
        radii -= _float64([row.radius * row.correct for row in base_rows])
    error = float(radii.std() / math.sqrt(len(radii))) if len(radii) > 1 else None
    return float(radii.mean()), error


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right and certified at this radius."""
    return sum(row.correct and row.radius >= radius for row in rows) / len(rows)


def write_certificates(file, rows) -> None:
    """Append rows to an open TSV, after a header if it is empty."""
    header = [Certificate._fields] if file.tell() == 0 else []
    csv.writer(file, "excel-tab", lineterminator="\n").writerows([*header, *rows])
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """From a TSV of some or all columns. ValueError names the line."""
    parsers = dict.fromkeys(Certificate._fields, int)
    parsers |= {"radius": float, "time": str, "sigma": float, "alpha": float}
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header, *lines = file.readlines() or [""]
    names = header[:-1].split("\t")
    usual = names[:5] == [*parsers][:5] and set(names) <= set(parsers)
    require(usual, f"{path}: line 1 heads no certificates in UTF-8")
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            require(line[-1] == "\n", "it was cut; remove it")
            cells = zip(names, line[:-1].split("\t"), strict=True)
            fields = {name: parsers[name](cell) for name, cell in cells if cell}
            rows.append(Certificate(**fields))
            require(0 <= rows[-1].radius < math.inf, "a radius is a number from 0")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no certificate ({error})") from None
    return rows
