"""Randomized smoothing: certify any classifier `images -> logits`.

    g = Smooth(classifier, num_classes=10, sigma=0.25)
    g.certify(images, labels)                    # CERTIFY: classes and l2 radii
    g.predict(images)                            # PREDICT: classes, or ABSTAIN
    cache = g.certify_and_cache(images, labels)  # CERTIFY, keeping what f predicted
    Smooth(changed, 10, 0.25).certify_incremental(images, cache, n_p=100)  # IRS

This file stands alone (torch, scipy). Pixels are in [0, 1], sigma and radii in their units;
noise is added before any normalisation.

    paper     here        meaning
    f, f^P    classifier  base, changed classifier: images (B, C, H, W) -> logits (B, k)
    g         Smooth      g(x) = argmax_c P[f(x + eps) = c], eps ~ N(0, sigma^2 I)
    c_A       selected    class chosen on n0 samples; the bounds use others
    n_A, n_B  n_a, n_b    votes of n for c_A, for the most counted other class
    p_A, p_B  p_a, p_b    bounds of P[f(x + eps) = c], c_A from below, others above
    n_p       n_p         samples of f^P per image
    zeta      zeta        upper confidence bound of P[f(x + eps) != f^P(x + eps)]
    R         radius      g is constant within this l2 distance of x

Cohen, Rosenfeld, Kolter, ICML 2019 (CERTIFY, PREDICT); Ugare et al., ICLR 2024 (IRS).
"""

import hashlib
import math
import statistics
import time
from datetime import timedelta
from itertools import repeat
from typing import NamedTuple, TextIO

import torch
from scipy.stats import beta, binomtest, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm

ABSTAIN = -1
METHODS = "none", "fresh", "replayed"  # of an incremental certificate
CHUNK = 100  # samples drawn at a time, whatever the batch size


def require(condition, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- bounds and radii ----
def lower_confidence_bound(k, n, alpha):
    """One-sided Clopper-Pearson bound, from k successes in n trials:
    P[bound <= true probability] >= 1 - alpha. Numbers give a float, arrays a tensor."""
    k, n, alpha = (_float64(value).numpy() for value in (k, n, alpha))
    inside = (alpha > 0) & (alpha < 1)
    require(inside.all(), f"alpha must lie between 0 and 1, not at {alpha}")
    possible = (k >= 0) & (k <= n) & (n >= 1)
    require(possible.all(), "counts must satisfy 0 <= k <= n and n >= 1")
    positive = k > 0  # k = 0 has no beta quantile: its bound is 0
    return _unwrap(beta.ppf(alpha, k + ~positive, n - k + 1) * positive)


def upper_confidence_bound(k, n, alpha):
    """The same from above: P[bound >= true probability] >= 1 - alpha."""
    return 1 - lower_confidence_bound(torch.as_tensor(n) - torch.as_tensor(k), n, alpha)


def certified_radius(p_a, sigma: float, p_b=None):
    """R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), in l2 (ARQ, Theorem 2.1).
    p_a bounds the predicted class from below, p_b all others from above. Without p_b it is
    1 - p_a: R = sigma Phi^-1(p_A), as published. 0 where nothing is certified."""
    require(sigma > 0, f"sigma must be positive, not {sigma}")
    p_a = _float64(p_a)
    p_b = 1 - p_a if p_b is None else _float64(p_b)
    possible = (p_a >= 0) & (p_a <= 1) & (p_b >= 0) & (p_b <= 1)
    require(possible.all(), "probabilities must lie between 0 and 1")
    certified = p_a > p_b  # else 1/2: infinite quantiles have no difference
    quantile_a = norm.ppf(torch.where(certified, p_a, 0.5))
    minus_quantile_b = norm.isf(torch.where(certified, p_b, 0.5))  # precise near 0
    return _unwrap(sigma / 2 * (quantile_a + minus_quantile_b))


def _float64(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).cpu()


def _unwrap(array):
    return torch.as_tensor(array) if array.ndim else float(array)


# ---- noise ----
def draw_noise(key: str, image_id: int, chunk: int, shape, device) -> Tensor:
    """Standard normal noise (CHUNK, *shape), equal for equal arguments and device type."""
    start = hashlib.sha256(f"{key}|{image_id}".encode()).digest()
    # CPU generators keep 32 bits: chunks count up from start, so none repeats.
    seed = (int.from_bytes(start[:4], "little") + chunk) % 2**32
    generator = torch.Generator(device).manual_seed(seed)
    # Contiguous: channels_last order is several times slower on a CPU.
    return torch.randn(CHUNK, *shape, generator=generator, device=device)


# ---- certificates ----
class Certificate(NamedTuple):  # other tools know the first six fields only
    idx: int  # the image's id
    label: int
    predict: int  # g's class, or ABSTAIN
    radius: float  # 0 where g abstains
    correct: int  # 1 if predict is the label, else 0
    time: str  # h:mm:ss.ffffff
    selected: int | None = None  # c_A
    n_a: int | None = None  # votes for c_A
    n_b: int | None = None  # votes for the most counted other class
    n: int | None = None  # samples that voted; 0 for a skipped image
    n0: int | None = None  # samples that selected c_A
    sigma: float | None = None
    alpha: float | None = None


COLUMNS = list(Certificate._fields)
PARSERS = dict.fromkeys(COLUMNS, int)
PARSERS |= {"radius": float, "time": str, "sigma": float, "alpha": float}


class ReplayCache(NamedTuple):
    certificates: list[Certificate]  # of f
    predictions: Tensor  # f's class for each sample (B, n); 0 if skipped
    key: str  # names the noise of those samples


class IncrementalCertificate(NamedTuple):  # of f^P
    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    method: str  # one of METHODS
    passes: int  # samples of f^P, none where f's class is wrong
    zeta: float  # nan unless replayed


class Smooth:
    """The smoothed classifier g of a callable f. num_classes may be None.
    seed, purpose: name the noise; equal names draw equal noise
    batch_size: samples per forward pass
    Guarantees hold in real, not in floating-point arithmetic (Voracek, Hein 2023).
    ValueError: pixels beyond [0, 1], repeated ids, training mode, logits of no class."""

    def __init__(
        self, classifier, num_classes, sigma, seed=0, batch_size=100, purpose="certificate"
    ):
        require(sigma > 0, f"sigma must be positive, not {sigma}")
        require(batch_size >= 1, f"batch_size must be at least 1, not {batch_size}")
        self.classifier, self.num_classes = classifier, num_classes
        self.sigma, self.batch_size = sigma, batch_size
        self.key = f"{seed}|{purpose}"  # equal keys replay the noise
        self.samples = 0  # noisy images that f has classified

    def certify(self, images, labels, ids=None, n0=100, n=1000, alpha=0.001):
        """CERTIFY (Cohen et al., section 3.2.2): a Certificate per image.
        Unless it abstains, g predicts `predict` everywhere closer than `radius`, with
        probability at least 1 - alpha each. ids name the noise (default: positions)."""
        return self.certify_and_cache(images, labels, ids, n0, n, alpha, False).certificates

    def certify_and_cache(
        self, images, labels, ids=None, n0=100, n=1000, alpha=0.001, skip_wrong=True
    ):
        """CERTIFY for the base classifier f, as a ReplayCache.
        skip_wrong: no samples where c_A is wrong, which adds 0 to every ACR."""
        start = time.monotonic()
        ids = range(len(images)) if ids is None else ids
        # counts0 <- SampleUnderNoise(f, x, n0, sigma)
        counts0 = self.sample_under_noise(images, ids, n0, self.key + "/select")
        labels = self._checked_labels(labels, len(images))
        # c_A <- top index in counts0
        selected = counts0.argmax(1)
        # counts <- SampleUnderNoise(f, x, n, sigma)
        sizes = torch.where(selected == labels, n, 0 if skip_wrong else n)
        key = f"{self.key}/estimate{n}"  # another n draws all samples anew
        predictions = self.predictions(images, ids, sizes, key)
        n_a, n_b = _votes(self._count(predictions, sizes), selected)
        # p_A <- LowerConfBound(counts[c_A], n, 1 - alpha)
        p_a = lower_confidence_bound(n_a, n, alpha)
        # if p_A > 1/2 return prediction c_A and radius sigma Phi^-1(p_A), else ABSTAIN
        predicted = torch.where(p_a > 0.5, selected, ABSTAIN)
        radius = certified_radius(p_a, self.sigma)
        correct = (predicted == labels).long()
        seconds = timedelta(seconds=(time.monotonic() - start) / len(labels))
        answer = [ids, labels, predicted, radius, correct, repeat(str(seconds))]
        evidence = [selected, n_a, n_b, sizes, repeat(n0), repeat(self.sigma), repeat(alpha)]
        rows = _records(Certificate, answer + evidence)
        missing = n - predictions.shape[1]  # if all images were skipped
        return ReplayCache(rows, F.pad(predictions, (0, missing)), key)

    def predict(self, images, ids=None, n=1000, alpha=0.001) -> list[int]:
        """PREDICT (Cohen et al., section 3.2.1): classes, each wrong with at most alpha."""
        ids = range(len(images)) if ids is None else ids
        predicted = []
        # counts <- SampleUnderNoise(f, x, n, sigma)
        counts = self.sample_under_noise(images, ids, n, self.key + "/predict")
        # c_A, c_B <- top two indices in counts; n_A, n_B <- their counts
        votes, classes = counts.topk(2, dim=1)
        for (n_a, n_b), (c_a, _) in zip(votes.tolist(), classes.tolist()):
            # if BinomPValue(n_A, n_A + n_B, 0.5) <= alpha return c_A, else ABSTAIN
            p_value = binomtest(n_a, n_a + n_b, 0.5).pvalue
            predicted.append(c_a if p_value <= alpha else ABSTAIN)
        return predicted

    def certify_incremental(self, images, cache, n_p, alpha_zeta=0.001, gamma=0.99):
        """IRS (Ugare et al., Algorithm 2): certify a changed f^P with n_p samples, not n.
        `self` smooths f^P; images and noise are those of f's cache. With probability at least
        1 - (alpha + alpha_zeta) each, g^P predicts `predict` within `radius`, for an f^P that
        was chosen without this noise (the winner of a search was not).

        Why alpha + alpha_zeta, with the fresh branch bounded at alpha? Let p be the true
        P[f = c_A]. If p >= gamma, a replay's p_A is below p: it fails by zeta alone; a fresh
        bound fails with alpha. If p < gamma, a fresh branch means that f's bound failed, as
        it may with alpha; a replay fails by it or zeta."""
        selected, right, ids = self._cached(cache)
        n, alpha = cache.predictions.shape[1], cache.certificates[0].alpha
        require(0 < alpha_zeta < 1 - alpha, f"alpha_zeta must be in 0 to 1 - {alpha}")
        require(n_p <= n, f"n_p = {n_p} exceeds the {n} cached samples")
        # c_A, p_A <- what f was certified with
        n_a = torch.tensor([row.n_a for row in cache.certificates])
        p_a = lower_confidence_bound(n_a, n, alpha)
        # if p_A < gamma:
        replay = right & (p_a < gamma)
        #     n_delta <- how often f^P and f disagree on the first n_p cached samples
        new = self.predictions(images, ids, replay * n_p, cache.key)
        n_delta = (new != cache.predictions[:, : new.shape[1]]).sum(1)
        #     zeta <- UpperConfBound(n_delta, n_p, alpha_zeta); p <- p_A - zeta
        zeta = upper_confidence_bound(n_delta, n_p, alpha_zeta)
        p_replayed = (p_a - zeta).clamp(min=0)
        # else:
        fresh = right & ~replay
        #     counts <- SampleUnderNoise(f^P, x, n_p, sigma), on fresh noise
        new = self.predictions(images, ids, fresh * n_p, cache.key + "/fresh")
        #     p <- LowerConfBound(counts[c_A], n_p, alpha)
        votes = (new == selected[:, None]).sum(1)
        p_fresh = lower_confidence_bound(votes, n_p, alpha)
        # if p > 1/2 return prediction c_A and radius sigma Phi^-1(p), else ABSTAIN
        p = torch.where(replay, p_replayed, p_fresh)
        radius = torch.where(right, certified_radius(p, self.sigma), 0.0)
        predicted = torch.where(radius > 0, selected, ABSTAIN)
        labels = [row.label for row in cache.certificates]
        answer = [ids, labels, predicted, radius, (radius > 0).long()]
        methods = [METHODS[index] for index in (fresh + 2 * replay).tolist()]
        evidence = [methods, right * n_p, torch.where(replay, zeta, math.nan)]
        return _records(IncrementalCertificate, answer + evidence)

    def estimate_radii(self, images, cache, n_p: int) -> Tensor:
        """For ranking, no certificates: radii (B,) if all n votes are as the first n_p."""
        selected, right, ids = self._cached(cache)
        n, alpha = cache.predictions.shape[1], cache.certificates[0].alpha
        new = self.predictions(images, ids, right * n_p, cache.key)
        votes = (new == selected[:, None]).sum(1) * (n / n_p)
        p_a = lower_confidence_bound(votes.clamp(max=n), n, alpha)
        return torch.where(right, certified_radius(p_a, self.sigma), 0.0)

    def _cached(self, cache: ReplayCache):
        """c_A, whether it is right, and ids: (B,) each."""
        sigma = cache.certificates[0].sigma
        require(sigma == self.sigma, f"the cache has sigma {sigma}, g has {self.sigma}")
        rows = [(row.selected, row.label, row.idx) for row in cache.certificates]
        selected, labels, ids = torch.tensor(rows).T
        return selected, selected == labels, ids

    def _checked_labels(self, labels, count: int) -> Tensor:
        labels, last = torch.as_tensor(labels).cpu(), self.num_classes - 1
        valid = labels.shape == (count,) and 0 <= labels.min() and labels.max() <= last
        require(valid, f"{count} images need as many labels from 0 to {last}")
        return labels

    def sample_under_noise(self, images, ids, n: int, key: str) -> Tensor:
        """Counts (B, classes) of f's predictions on n noisy copies."""
        sizes = torch.full((len(images),), n)
        return self._count(self.predictions(images, ids, sizes, key), sizes)

    def _count(self, predictions: Tensor, sizes: Tensor) -> Tensor:
        """Counts (B, classes) among the first sizes[i] of predictions[i]."""
        rows = [row[:size].long() for row, size in zip(predictions, sizes.tolist())]
        return torch.stack([row.bincount(minlength=self.num_classes) for row in rows])

    @torch.inference_mode()
    def predictions(self, images, ids, sizes: Tensor, key: str) -> Tensor:
        """f's classes of sizes[i] copies of images[i], then zeros: (B, max size).
        All methods sample here, in full batches."""
        valid = images.is_floating_point() and ((images >= 0) & (images <= 1)).all()
        require(valid, "images must be floats in [0, 1]; divide 8-bit ones by 255")
        ids = torch.as_tensor(ids).tolist()
        named = len(images) == len(ids) == len(set(ids))
        require(named, f"{len(images)} images need as many different ids")
        batches = _full_batches(self._noisy(images, ids, sizes, key), self.batch_size)
        classes = [self._classify(batch).cpu() for batch in batches]
        dtype = torch.uint8 if (self.num_classes or 0) <= 2**8 else torch.int32
        table = torch.zeros(len(sizes), int(sizes.max()), dtype=dtype)
        if classes:
            sampled = torch.arange(table.shape[1]) < sizes[:, None]
            table[sampled] = torch.cat(classes).to(dtype)
        return table

    def _noisy(self, images, ids, sizes, key):
        """The noisy copies, up to CHUNK at a time."""
        for image, image_id, size in zip(images, ids, sizes.tolist()):
            for chunk in range(math.ceil(size / CHUNK)):
                noise = draw_noise(key, image_id, chunk, image.shape, image.device)
                yield noise[: size - chunk * CHUNK].mul_(self.sigma).add_(image)

    def _classify(self, noisy: Tensor) -> Tensor:
        """f's classes (B,); whatever is no answer is refused."""
        if isinstance(self.classifier, nn.Module):
            for module in self.classifier.modules():
                require(not module.training, "training mode: call the classifier's eval()")
                if isinstance(module, batchnorm._BatchNorm):
                    averaged = module.running_mean is not None
                    require(averaged, "a BatchNorm without running statistics")
            floats = (p for p in self.classifier.parameters() if p.is_floating_point())
            noisy = noisy.to(next(floats, noisy).dtype)
        logits = self.classifier(noisy)
        self.samples += len(noisy)
        is_tensor = isinstance(logits, Tensor)
        shape = logits.shape if is_tensor else type(logits).__name__
        require(shape[:-1] == noisy.shape[:1], f"f gives no logits (B, classes): {shape}")
        self.num_classes = self.num_classes or shape[1]
        same = 1 < shape[1] == self.num_classes
        require(same, f"{self.num_classes} classes, but {shape[1]} logits")
        largest, classes = logits.max(1)  # nan where there is one
        alone = (logits == largest[:, None]).sum(1) == 1  # +inf, too, is then an answer
        require((largest.isfinite() | alone).all(), "logits are not finite")
        return classes


def _records(record_type, columns: list) -> list:
    """A record per image, from a column per field."""
    columns = [c.tolist() if isinstance(c, Tensor) else c for c in columns]
    return [record_type(*row) for row in zip(*columns)]


def _votes(counts: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """n_A and n_B (B,)."""
    c_a = selected[:, None]
    return counts.gather(1, c_a).squeeze(1), counts.scatter(1, c_a, 0).amax(1)


def _full_batches(parts, size: int):
    """The rows of all parts, `size` at a time; then what is left."""
    batch, room = [], size
    for part in parts:
        while len(part):
            piece, part = part.tensor_split([room])
            batch.append(piece)
            room -= len(piece)
            if room == 0:
                yield torch.cat(batch)
                batch, room = [], size
    if batch:
        yield torch.cat(batch)


# ---- aggregates and files ----
def two_sided(rows: list[Certificate]) -> list[Certificate]:
    """The same by Theorem 2.1, p_A and p_B at alpha / 2 each; n_b bounds the runner-up, too.
    Either radius fails with at most alpha; the larger, taken afterwards, 1.5 alpha."""
    certificates = []
    for row in rows:
        require(None not in (row.n_a, row.n_b), "a two-sided radius needs counts n_a, n_b")
        n = max(row.n, 1)
        p_a = lower_confidence_bound(row.n_a, n, row.alpha / 2)
        p_b = upper_confidence_bound(row.n_b, n, row.alpha / 2)
        predict = row.selected if p_a > p_b else ABSTAIN
        radius = certified_radius(p_a, row.sigma, p_b)
        correct = int(predict == row.label)
        certificates.append(row._replace(predict=predict, radius=radius, correct=correct))
    return certificates


def average_certified_radius(rows) -> float:
    """ACR: the mean over images of radius * 1[correct] (ARQ, section 2)."""
    return statistics.fmean(row.radius * row.correct for row in rows)


def acr_difference(rows, base_rows=None) -> tuple[float, float | None]:
    """Mean and standard error of radius * 1[correct], less base_rows' if given."""
    radii = _float64([row.radius * row.correct for row in rows])
    if base_rows is not None:
        radii -= _float64([row.radius * row.correct for row in base_rows])
    error = float(radii.std() / math.sqrt(len(radii))) if len(radii) > 1 else None
    return float(radii.mean()), error


def certified_accuracy(rows, radius: float) -> float:
    """Share of images that are right and certified at this radius."""
    return statistics.fmean(bool(row.correct) and row.radius >= radius for row in rows)


def write_certificates(file: TextIO, rows: list[Certificate]) -> None:
    """Append unrounded rows to an open TSV, after a header if it is empty."""
    if file.tell() == 0:
        file.write("\t".join(COLUMNS) + "\n")
    for row in rows:
        file.write("\t".join("" if value is None else str(value) for value in row) + "\n")
    file.flush()


def read_certificates(path) -> list[Certificate]:
    """Read a TSV, all columns or the usual six. ValueError names file and line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:  # or plain UTF-8
        header, *lines = file.read().split("\n")
    names = header.split("\t")
    usual = names[:5] == COLUMNS[:5] and set(names) <= set(COLUMNS)
    require(usual and lines, f"{path}: line 1 is no header of certificates in UTF-8")
    require(lines[-1] == "", f"{path}: line {len(lines) + 1} was cut; remove it")
    rows = []
    for number, line in enumerate(lines[:-1], 2):
        try:
            cells = zip(names, line.split("\t"), strict=True)
            known = [(name, cell) for name, cell in cells if cell or name == "time"]
            rows.append(Certificate(**{name: PARSERS[name](cell) for name, cell in known}))
            require(0 <= rows[-1].radius < math.inf, "a radius is a number from 0")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no certificate ({error})") from None
    return rows
