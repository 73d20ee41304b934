"""Randomized smoothing: certify any classifier `images -> logits`, from scratch or incrementally.

This file stands alone (torch and scipy): copy it. Images are float tensors in [0, 1], (channels, height,
width); noise has standard deviation sigma in those units and is added there, before any normalisation.

    paper     here          meaning
    f, f^P    classifier    base classifier, changed classifier: images (B, C, H, W) -> logits (B, classes)
    g         -             smoothed classifier, g(x) = argmax_c P[f(x + eps) = c] with eps ~ N(0, sigma^2 I)
    c_A       selected      the class chosen on n0 samples; the bounds use samples this choice did not see
    n_A, n_B  n_a, n_b      votes for c_A, and for the most counted other class, among n samples
    p_A       p_lower       lower confidence bound of P[f(x + eps) = c_A]
    n_p       n_p           samples of f^P per image in the incremental certificate
    zeta      zeta          upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    p_B       p_upper       upper confidence bound of the probability of every other class; 1 - p_A one-sided
    R         radius        certified l2 radius: g is constant on the ball of this radius around x

Sources: Cohen, Rosenfeld and Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS)."""

import hashlib
import math
import statistics
import time
import warnings
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from typing import Callable, Iterator, NamedTuple, Optional, Sequence, TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor

ABSTAIN = -1
CHUNK = 100  # noise is drawn this many samples at a time: a sample's noise must not depend on the batch size
Classifier = Callable[[Tensor], Tensor]


# ---- bounds and radii ----

def lower_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson lower bound on a probability, from k successes in n independent trials:
    P[bound <= truth] >= 1 - alpha. Numbers give a float, arrays (or broadcast) a float64 tensor. Raises
    ValueError unless 0 <= k <= n, n >= 1 and 0 < alpha < 1."""
    k, n, alpha = _as_array(k), _as_array(n), _as_array(alpha)
    if not ((alpha > 0) & (alpha < 1)).all():
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    if not ((k >= 0) & (k <= n) & (n >= 1)).all():
        raise ValueError("counts must satisfy 0 <= k <= n and n >= 1")
    positive = k > 0  # k = 0 has no beta quantile: its bound is 0
    return _as_tensor(beta.ppf(alpha, k + ~positive, n - k + 1) * positive)


def upper_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson upper bound: P[bound >= true probability] >= 1 - alpha. Same arguments."""
    return 1 - lower_confidence_bound(_as_array(n) - _as_array(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """Certified l2 radius sigma/2 (Phi^-1(p_A) - Phi^-1(p_B)) (ARQ, Theorem 2.1), in pixels of [0, 1] images.
    p_a bounds the predicted class's probability from below, p_b every other's from above; without p_b,
    1 - p_a takes its place (the one-sided radius, sigma Phi^-1(p_A), of published tables). Numbers or arrays;
    0 where nothing is certified. Raises ValueError unless sigma > 0 and 0 <= p_a, p_b <= 1."""
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, not {sigma}")
    p_a = _as_array(p_a)
    p_b = 1 - p_a if p_b is None else _as_array(p_b)
    if not ((p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1)).all():
        raise ValueError("probabilities must lie between 0 and 1")
    certified = p_a > p_b  # elsewhere infinite quantiles may have no difference: 1/2 stands for both
    difference = norm.ppf(p_a + ~certified * (0.5 - p_a)) + norm.isf(p_b + ~certified * (0.5 - p_b))
    return _as_tensor(sigma / 2 * difference)


def can_certify(n: int, alpha: float) -> bool:
    """Whether n samples that all agree give a radius above 0 at this alpha (10 needed at alpha = 0.001)."""
    return lower_confidence_bound(n, n, alpha) > 0.5


def _as_array(value):
    return torch.as_tensor(value, dtype=torch.float64).cpu().numpy()


def _as_tensor(array):
    return torch.from_numpy(array) if array.ndim else float(array)


# ---- noise and sampling ----

class NoiseKey(NamedTuple):
    """Names one source of noise. Equal keys replay it; another seed or purpose gives fresh noise."""
    seed: int
    purpose: str

    def derive(self, part: str) -> "NoiseKey":
        return NoiseKey(self.seed, f"{self.purpose}/{part}")


def draw_noise(key: NoiseKey, image_id: int, chunk: int, shape: Sequence[int], device) -> Tensor:
    """Standard normal noise (CHUNK, *shape): samples CHUNK * chunk onwards of one image under one key, by the
    arguments and the device type alone, so that predictions can be replayed in any batch size."""
    digest = hashlib.sha256(f"{key.seed}|{key.purpose}|{image_id}".encode()).digest()
    # A CPU generator keeps 32 bits of its seed. Counting chunks up from the image's own start keeps them
    # apart, where 1,000 independent seeds would repeat one, and with it the noise, in 1 of 8,600 images.
    seed = (int.from_bytes(digest[:4], "little") + chunk) % 2 ** 32
    # Contiguous: drawing in channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)


@torch.inference_mode()
def noisy_predictions(classifier: Classifier, images: Tensor, ids: Sequence[int], sizes: Sequence[int],
                      sigma: float, key: NoiseKey, batch_size: int, first: int = 0) -> Iterator[tuple]:
    """Classify noisy copies first .. first + sizes[i] - 1 of images[i] (B, C, H, W), in order, in full
    batches. Yields (rows, classes) of equal length, on the CPU: row i was given class c once."""
    batch, rows, left = [], [], int(sum(sizes))
    for row, (image, image_id, size) in enumerate(zip(images, ids, sizes)):
        last = first + int(size)
        for chunk in range(first // CHUNK, math.ceil(last / CHUNK)):
            start = chunk * CHUNK
            noise = draw_noise(key, image_id, chunk, image.shape, image.device)
            noisy = noise[max(0, first - start):max(0, last - start)].mul_(sigma).add_(image)
            while len(noisy):
                part, noisy = noisy.tensor_split([batch_size - len(rows)])
                batch.append(part)
                rows += [row] * len(part)
                left -= len(part)
                if len(rows) == batch_size or left == 0:
                    yield torch.tensor(rows), _classify(classifier, torch.cat(batch))
                    batch, rows = [], []


def _classify(classifier: Classifier, batch: Tensor) -> Tensor:
    """Predicted classes (B,), on the CPU. A batch that memory cannot hold is halved, with a warning."""
    try:
        return classifier(batch).argmax(1).cpu()
    except RuntimeError as error:  # of GPUs, of CPUs
        if len(batch) == 1 or not any(text in str(error) for text in ("out of memory", "allocate memory")):
            raise
    warnings.warn(f"out of memory with {len(batch)} samples at a time, halved; smaller batches are faster")
    return torch.cat([_classify(classifier, half) for half in batch.chunk(2)])


def class_counts(classifier: Classifier, images: Tensor, ids: Sequence[int], n: int, num_classes: int,
                 sigma: float, key: NoiseKey, batch_size: int) -> Tensor:
    """How often each class was predicted among n noisy copies of every image: (B, num_classes), int64."""
    counts = torch.zeros(len(images) * num_classes, dtype=torch.int64)
    for rows, classes in noisy_predictions(classifier, images, ids, [n] * len(ids), sigma, key, batch_size):
        counts += torch.bincount(rows * num_classes + classes, minlength=len(counts))
    return counts.view(-1, num_classes)


# ---- certificates ----

@dataclass
class Certificate:
    """One certified image. predict is ABSTAIN (-1) with radius 0 where the bound does not exceed 1/2.
    Existing tools read the first six fields; the rest is what the radius was computed from: votes for the
    selected class and the most counted other one, sample sizes, sigma and alpha."""
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    time: str
    selected: Optional[int] = None
    n_a: Optional[int] = None
    n_b: Optional[int] = None
    n: Optional[int] = None
    n0: Optional[int] = None
    sigma: Optional[float] = None
    alpha: Optional[float] = None


def certify(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
            num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
            batch_size: int = 100) -> list[Certificate]:
    """CERTIFY (Cohen et al., section 3.2.2) for a block of images (B, C, H, W) in [0, 1].

    For each image, with probability at least 1 - alpha over the noise: unless the certificate abstains, the
    smoothed classifier predicts `predict` everywhere closer than `radius` in l2. Image by image: about
    alpha * B certificates may be wrong. As in all common code, the guarantee is one of real, not of
    floating-point arithmetic (Voracek and Hein, 2023). `ids` name the images."""
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)                                      # c_A, on samples the bound does not use
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, estimate_key(key, n), batch_size)
    return _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)


def estimate_key(key: NoiseKey, n: int) -> NoiseKey:
    """Noise behind the bound. n is part of it: asked for more samples, a run draws all of them anew."""
    return key.derive(f"estimate{n}")


def _certificates(ids, labels, selected, counts, n0, sigma, alpha, start) -> list[Certificate]:
    """Certificates from selected classes (B,) and votes (B, classes); an image without votes abstains."""
    n = counts.sum(1)
    n_a = counts.gather(1, selected[:, None]).squeeze(1)
    n_b = counts.scatter(1, selected[:, None], 0).amax(1)
    p_lower = lower_confidence_bound(n_a, n.clamp(min=1), alpha)
    radius = certified_radius(p_lower, sigma)
    top = torch.where(p_lower > 0.5, selected, ABSTAIN)
    seconds = str(timedelta(seconds=(time.monotonic() - start) / len(labels)))
    columns = (column.tolist() for column in (top, radius, selected, n_a, n_b, n))
    return [Certificate(int(i), int(label), top, radius, int(top == label), seconds, *rest, n0, sigma, alpha)
            for i, label, top, radius, *rest in zip(ids, labels, *columns)]


def two_sided(rows: Sequence[Certificate]) -> list[Certificate]:
    """The same certificates by Theorem 2.1 in full: p_A and p_B bounded at alpha / 2 each, from n_a and n_b.
    The most counted other class needs no correction over classes: its bound is at least that of the true
    runner-up. Either radius is wrong with probability at most alpha; the larger, taken afterwards, with up to
    1.5 alpha. Raises ValueError for rows without counts."""
    if any(row.n_a is None or row.n_b is None for row in rows):
        raise ValueError("these certificates hold no counts; a two-sided radius needs n_a and n_b")
    certificates = []
    for row in rows:
        p_a = lower_confidence_bound(row.n_a, max(row.n, 1), row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, max(row.n, 1), row.alpha / 2)
        top = row.selected if p_a > p_b else ABSTAIN
        certificates.append(replace(row, predict=top, radius=certified_radius(p_a, row.sigma, p_b),
                                    correct=int(top == row.label)))
    return certificates


def predict(classifier: Classifier, images: Tensor, ids: Sequence[int], num_classes: int, sigma: float,
            n: int, alpha: float, key: NoiseKey, batch_size: int = 100) -> list[int]:
    """PREDICT (Cohen et al., section 3.2.1): g's class for each image (B, C, H, W), wrong with probability at
    most alpha; ABSTAIN where a two-sided binomial test cannot tell the two most voted classes apart."""
    counts = class_counts(classifier, images, ids, n, num_classes, sigma, key.derive("predict"), batch_size)
    votes, classes = counts.topk(2, dim=1)
    return [int(top[0]) if binomtest(int(vote[0]), int(vote.sum()), 0.5).pvalue <= alpha else ABSTAIN
            for vote, top in zip(votes, classes)]


# ---- incremental randomized smoothing (IRS) ----

@dataclass
class ReplayCache:
    """f's certificates for a set of images, and what it predicted for every sample behind them: (B, n) uint8
    (int16 beyond 256 classes), zeros where nothing was sampled; key: the noise."""
    certificates: list[Certificate]
    predictions: Tensor
    key: NoiseKey


def certify_and_cache(classifier: Classifier, images: Tensor, labels: Sequence[int], ids: Sequence[int],
                      num_classes: int, sigma: float, n0: int, n: int, alpha: float, key: NoiseKey,
                      batch_size: int = 100) -> ReplayCache:
    """CERTIFY for the base classifier f, keeping each sample's prediction; guarantee as in `certify`.
    An image whose selected class is wrong adds 0 to the ACR of f and f^P: no samples, it abstains."""
    start = time.monotonic()
    counts0 = class_counts(classifier, images, ids, n0, num_classes, sigma, key.derive("select"), batch_size)
    selected = counts0.argmax(1)
    sizes = n * (selected == torch.as_tensor(labels))
    key = estimate_key(key, n)
    dtype = torch.uint8 if num_classes <= 256 else torch.int16
    found = _predictions(classifier, images, ids, sigma, batch_size, dtype, sizes, key, 0)
    predictions = torch.zeros(len(images), n, dtype=dtype)
    predictions[:, :found.shape[1]] = found
    counts = torch.stack([row.long().bincount(minlength=num_classes) for row in predictions])
    counts *= (sizes > 0)[:, None]
    rows = _certificates(ids, labels, selected, counts, n0, sigma, alpha, start)
    return ReplayCache(rows, predictions, key)


def _predictions(classifier, images, ids, sigma, batch_size, dtype, sizes, key, first) -> Tensor:
    """Predicted classes (B, largest size) of noisy copies first .. first + sizes[i] - 1, then zeros."""
    stream = noisy_predictions(classifier, images, ids, sizes.tolist(), sigma, key, batch_size, first)
    found = [torch.empty(0, dtype=dtype), *(classes.to(dtype) for _, classes in stream)]
    predictions = torch.zeros(len(images), int(sizes.max()), dtype=dtype)
    predictions[torch.arange(predictions.shape[1]) < sizes[:, None]] = torch.cat(found)
    return predictions


# One image certified for f^P: by samples replayed, fresh or none, and how many; zeta, nan if unused.
IncrementalCertificate = NamedTuple("IncrementalCertificate", [
    ("idx", int), ("label", int), ("predict", int), ("radius", float), ("correct", int),
    ("method", str), ("passes", int), ("zeta", float)])


def certify_incremental(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                        alpha_zeta: float, gamma: float = 0.99,
                        batch_size: int = 100) -> list[IncrementalCertificate]:
    """IRS (Ugare et al., Algorithm 2): certify a changed classifier f^P with n_p samples an image, not n.

    images: (B, C, H, W), those of the cache. For each image, with probability at least 1 - (alpha +
    alpha_zeta), g^P predicts `predict` within `radius` (one-sided), for an f^P fixed without looking at this
    noise: a search that compares many f^P on one cache scores them, and its winner needs a new certificate.

    Where p_A < gamma, f^P is replayed on the first n_p cached samples; zeta bounds P[f != f^P], p_A - zeta
    bounds P[f^P = c_A]. p_A fails with probability alpha, zeta with alpha_zeta; by the union bound they may
    share samples. Elsewhere (with gamma = 0, everywhere) n_p fresh samples, one bound at alpha + alpha_zeta.
    Images whose cached class is wrong cost nothing and count 0. The branch depends on the p_A bound that it
    then uses, which the published argument takes for granted. Below gamma a fresh branch means that this
    bound failed, so alpha + alpha_zeta holds; elsewhere failure is at most alpha + 2 alpha_zeta. Raises
    ValueError for impossible alphas and n_p beyond the cached samples."""
    rows, n = cache.certificates, cache.predictions.shape[1]
    sigma, alpha = rows[0].sigma, rows[0].alpha
    if not (alpha_zeta > 0 and alpha + alpha_zeta < 1):
        raise ValueError(f"alpha + alpha_zeta = {alpha} + {alpha_zeta} must be positive and stay below 1")
    if n_p > n:
        raise ValueError(f"n_p = {n_p} exceeds the {n} cached samples")
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    p_a = lower_confidence_bound(torch.tensor([row.n_a for row in rows]), n, alpha)
    replay = right & (p_a < gamma)
    sample = _sampler(classifier, cache, images, batch_size)
    replayed = sample(n_p * replay, cache.key, 0)
    fresh = sample(n_p * (right & ~replay), cache.key.derive("fresh"), 0)
    n_delta = (replayed != cache.predictions[:, :replayed.shape[1]]).sum(1) * replay
    zeta = upper_confidence_bound(n_delta, n_p, alpha_zeta)
    p_fresh = lower_confidence_bound((fresh == selected[:, None]).sum(1), n_p, alpha + alpha_zeta)
    p_lower = torch.where(replay, (p_a - zeta).clamp(min=0), p_fresh)
    radii = torch.where(right, certified_radius(p_lower, sigma), 0.0).tolist()
    methods = ["replayed" if replay[i] else "fresh" if right[i] else "none" for i in range(len(rows))]
    columns = radii, methods, (n_p * right).tolist(), torch.where(replay, zeta, math.nan).tolist()
    return [IncrementalCertificate(row.idx, row.label, row.selected if radius > 0 else ABSTAIN, radius,
                                   int(radius > 0), *rest) for row, radius, *rest in zip(rows, *columns)]


def _sampler(classifier: Classifier, cache: ReplayCache, images: Tensor, batch_size: int) -> Callable:
    """sample(sizes, key, first): what f^P predicts for `sizes` (B,) samples from `first` on, (B, largest)."""
    ids, sigma = [row.idx for row in cache.certificates], cache.certificates[0].sigma
    return partial(_predictions, classifier, images, ids, sigma, batch_size, cache.predictions.dtype)


def estimate_radii(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                   batch_size: int = 100) -> Tensor:
    """For ranking, no certificates: radii (B,) if f^P's votes among all n cached samples were those among the
    first n_p. Candidates see the same noise, which largely cancels; few samples bias the radius upwards."""
    rows, n = cache.certificates, cache.predictions.shape[1]
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    replayed = _sampler(classifier, cache, images, batch_size)(n_p * right, cache.key, 0)
    votes = (replayed == selected[:, None]).sum(1) * (n / n_p)
    radii = certified_radius(lower_confidence_bound(votes.clamp(max=n), n, rows[0].alpha), rows[0].sigma)
    return torch.where(right, radii, 0.0)


# ---- aggregates and files ----

def average_certified_radius(rows) -> float:
    """ACR: mean over images of radius * 1[correct] (ARQ, section 2). Raises ValueError without rows."""
    return statistics.fmean(row.radius * row.correct for row in rows)


def acr_difference(rows, base_rows=None) -> tuple[float, float]:
    """ACR of rows, less that of base_rows on the same images if given; and its standard error over images."""
    values = torch.tensor([row.radius * row.correct for row in rows], dtype=torch.float64)
    if base_rows is not None:
        values = values - torch.tensor([row.radius * row.correct for row in base_rows], dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right, not abstained, and certified at least this l2 radius."""
    return statistics.fmean(bool(row.correct) and row.radius >= radius for row in rows)


COLUMNS = [field.name for field in fields(Certificate)]
PARSERS = {name: int for name in COLUMNS} | {"radius": float, "time": str, "sigma": float, "alpha": float}


def write_certificates(file: TextIO, rows: Sequence[Certificate]) -> None:
    """Append rows to an open TSV, after the header if it is empty. Radii keep full precision."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        file.write("\t".join("" if value is None else str(value) for value in vars(row).values()) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV of certificates, ours or with only the usual columns idx label predict radius correct time.
    A last line without its end is left out. Raises ValueError, naming the line, for anything else."""
    with open(path) as file:
        lines = file.read().split("\n")[:-1]
    names = lines[0].split("\t") if lines else []
    if names[:5] != COLUMNS[:5] or not set(names) <= set(COLUMNS):
        raise ValueError(f"{path}: line 1 is not a header of certificates ({' '.join(COLUMNS[:6])} ...)")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        try:
            cells = dict(zip(names, line.split("\t"), strict=True))
            rows.append(Certificate(**{name: PARSERS[name](cell) for name, cell in cells.items()
                                       if cell or name == "time"}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is not a certificate ({error})") from None
    return rows
