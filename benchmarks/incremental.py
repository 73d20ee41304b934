"""Sharper incremental certificates than IRS: a paired bound, and passes planned where they buy radius.

Beyond the paper; `certify.py` has IRS as published. `certify_incremental` here has the same arguments and a
mode: off, paper (both also in certify.py), paired, auto. `benchmarks/certify.py` measures them.
"""

import math
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import certify  # noqa: E402
from certify import ABSTAIN, Classifier, ReplayCache, certified_radius  # noqa: E402
from certify import lower_confidence_bound, upper_confidence_bound  # noqa: E402

MODES = ("off", "paper", "paired", "auto")
METHODS = ("none", "fresh", "paper", "paired")
NONE, FRESH, PAPER, PAIRED = range(4)


# One image certified for f^P, as in certify.py, and the replayed difference P[f^P = c_A] - P[f = c_A], nan
# where not used; `method` is one of METHODS, `passes` include a pilot's.
IncrementalCertificate = NamedTuple("IncrementalCertificate", [
    *certify.IncrementalCertificate.__annotations__.items(), ("difference", float)])


def paired_lower_bound(both: Tensor, lost: Tensor, gained: Tensor, m: Tensor, k: Tensor, n: Tensor,
                       alpha: float, bet: Tensor) -> Tensor:
    """Lower confidence bound (B,) of P[G], from m samples of F and G together and n others of F alone.

    F and G are the events f = c and f^P = c; `both`, `lost` and `gained` count samples where both, only F and
    only G hold; k of the n others have F. P[bound <= P[G]] >= 1 - alpha. With w = n / (n + m):

        P[G] = t + w P[F] with t = E[G - wF], for any w.
        The m samples bet on t: under E[G - wF] <= t, the wealth e(t) = prod_i 1 + bet (G_i - w F_i - t) has
        expectation at most 1, for a bet fixed in advance that leaves no factor negative.
        The n others give a p-value for P[F] <= p: the binomial tail q(p) of k or more among n.
        They share no sample, so P[q <= alpha e] <= E[min(1, alpha e)] <= alpha at the true t and p.
        Otherwise p is at least LCB(k, n, alpha e(t)), and P[G] = t + w p at least the minimum of
        t + w LCB(k, n, alpha e(t)) over all t.

    All of alpha is spent on this one comparison. e falls with t, so taking t from one end of a cell of a grid
    and e from the other errs downwards only.
    """
    both, lost, gained, m, k, n, bet = (part.double()[:, None] for part in (both, lost, gained, m, k, n, bet))
    w = n / (n + m)
    mean = (gained + (1 - w) * both - w * lost) / m
    square = (gained + (1 - w) ** 2 * both + w ** 2 * lost) / m
    spread = ((square - mean ** 2).clamp(min=0) / m).sqrt() + 1 / m
    offsets = torch.linspace(-5.3, 5.3, 161).sinh()  # dense near the mean, where the minimum lies
    t = (mean + spread * offsets).clamp(max=1).maximum(-w)
    t = torch.cat([-w, t, torch.ones_like(w)], 1)
    size = torch.minimum(bet, 0.9 / (w + t).clamp(min=1e-12))
    neither = m - both - lost - gained
    wealth = sum(count * torch.log1p(size * (value - t))
                 for count, value in ((both, 1 - w), (lost, -w), (gained, 1), (neither, 0)))
    # A hundredth stays out of the bet: wealth lost on a t far off must not stop the others from excluding it.
    level = alpha * (0.99 * wealth.clamp(max=700).exp() + 0.01)[:, 1:]
    p = lower_confidence_bound(k, n, level.clamp(max=0.999999))
    return torch.where(level >= 1, math.inf, t[:, :-1] + w * p).amin(1).clamp(0, 1)


def expected_radius(p: Tensor, weight: Tensor, samples: Tensor, alpha: float, loss=0.0) -> Tensor:
    """Mean radius over sigma (B, S) that `samples` (B, S) will certify at alpha, less `loss` off the bound,
    if p (B,) is known as from `weight` (B,) samples: over six quantiles of a beta distribution."""
    p, weight, samples = p[:, None, None], weight[:, None, None], samples.clamp(min=2)[..., None]
    size = samples * (weight + 1) / (weight + samples) - 1
    votes = torch.as_tensor(beta.ppf((torch.arange(6) + 0.5) / 6, p * size, (1 - p) * size)) * samples
    bound = lower_confidence_bound(votes, samples, alpha) - torch.as_tensor(loss)[..., None]
    return certified_radius(bound.clamp(min=0), 1.0).mean(-1)


def _share_out(gain: Tensor, method: Tensor, sizes: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The methods and sizes (B,) of largest total gain (B, S), by a price per pass that uses up `total`."""
    gain, method, sizes = (F.pad(part, (1, 0)) for part in (gain, method, sizes))  # or no pass at all
    low, high = 0.0, 1.0
    for _ in range(40):
        price = (low + high) / 2
        choice = (gain - price * sizes).argmax(1)
        low, high = (price, high) if sizes[choice].sum() > total else (low, price)
    choice = (gain - high * sizes).argmax(1)
    spent = max(1, int(sizes[choice].sum()))
    return method.gather(1, choice[:, None]).squeeze(1), sizes[choice] * total // spent


class Plan(NamedTuple):
    """What each image gets, fixed before any bound is computed, all (B,): index into METHODS, samples of f^P
    for the bound and for the pilot, bet of the paired bound. Bounds use cached samples from `first` on."""
    method: Tensor
    passes: Tensor
    pilot: Tensor
    bet: Tensor
    first: int


def plan_passes(cache: ReplayCache, sample: Callable, selected: Tensor, right: Tensor, n_p: int,
                alpha: float, alpha_zeta: float, share_out: bool) -> Plan:
    """Plan n_p passes an image of right class; share_out: so that the expected sum of radii is largest.

    Reads only the first tenth of the cached samples: f's votes tell how certain each image is, and a pilot, a
    twentieth of the passes replayed there, how often the vote for c_A changes per unit of its variance
    p (1 - p), an image's own rate drawn towards that of all. sample: see `certify._sampler`.
    """
    n = cache.predictions.shape[1]
    first, rest = n // 10, n - n // 10
    votes = (cache.predictions[:, :first] == selected[:, None]).sum(1)
    p = (votes.double() + 0.5) / (first + 1)
    variance = p * (1 - p)
    pilot = min(first, n_p // 20) * right
    replayed = sample(pilot, cache.key, 0)
    inside = torch.arange(replayed.shape[1]) < pilot[:, None]
    before = inside & (cache.predictions[:, :replayed.shape[1]] == selected[:, None])
    after = inside & (replayed == selected[:, None])
    lost, gained = (before & ~after).sum(1), (after & ~before).sum(1)
    units = pilot * variance
    change = (lost.sum() + gained.sum() + 1) / (units.sum() + 1)  # without a pilot, every vote may change
    shift = (gained.sum() - lost.sum()) / (units.sum() + 1)
    # Images differ by about half of what changes; each one's own pilot counts as it can tell more than that.
    spread = variance * change ** 2 / 4
    own = spread * pilot / (spread * pilot + change)
    shift = own * (gained - lost) / pilot.clamp(min=1) + (1 - own) * shift * variance
    change = (lost + gained + 5 * change) / (units + 5)

    def paired_variance(m: Tensor) -> Tensor:
        """Variance of G - wF (see `paired_lower_bound`), with a margin for what m samples cannot rule out."""
        w = 1 - m / rest
        return ((1 - w) ** 2 + w * change[:, None]) * variance[:, None] + 1 / m

    method, passes = PAIRED * right, (n_p - pilot) * right
    if share_out:
        sizes = torch.logspace(1, max(1.0, math.log10(rest)), 20).long().unique().double()
        p = (p + shift).clamp(0.5 / (first + 1), 1 - 0.5 / (first + 1))
        weight = 1 / (1 / (first + 1) + spread * (1 - own))
        w = 1 - sizes / rest
        effective = 1 / (w / rest + 1.2 * paired_variance(sizes) / (variance[:, None] * sizes))
        zeta = upper_confidence_bound((change * variance).clamp(max=1)[:, None] * sizes, sizes, alpha_zeta)
        total, ones = alpha + alpha_zeta, torch.ones_like(effective)
        gain, method = torch.stack([  # FRESH, PAPER, PAIRED
            expected_radius(p, weight, ones * sizes, total),
            expected_radius(p, weight, ones * rest, alpha, zeta),
            expected_radius(p, weight, effective, total) * (sizes <= rest / 2)]).max(0)
        method, passes = _share_out(gain * right[:, None], FRESH + method, sizes.long(), int(passes.sum()))
        passes = torch.minimum(passes, torch.where(method == PAIRED, rest // 2, rest))
    m = passes.clamp(min=1).double()[:, None]
    return Plan(method, passes, pilot, (7 / (m * paired_variance(m))).sqrt().squeeze(1), first)


def _lower_bounds(plan: Plan, old: Tensor, replayed: Tensor, fresh: Tensor, classes: Tensor, is_class: bool,
                  alpha: float, alpha_zeta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds (B,) of P[f^P = class], or of != where `is_class` is false; with zeta and difference."""
    bound = torch.zeros(len(old), dtype=torch.float64)
    zeta, difference = torch.full((2, len(old)), math.nan, dtype=torch.float64)
    for method in plan.method.unique().tolist():
        some = plan.method == method
        m, c = plan.passes[some], classes[some, None]
        new = fresh[some] if method == FRESH else replayed[some]
        inside = torch.arange(new.shape[1]) < m[:, None]
        after, before = inside & ((new == c) == is_class), (old[some] == c) == is_class
        if method == FRESH:
            bound[some] = lower_confidence_bound(after.sum(1), m, alpha + alpha_zeta)
        elif method == PAPER:
            changed = (inside & (new != old[some, :new.shape[1]])).sum(1)
            zeta[some] = upper_confidence_bound(changed, m, alpha_zeta)
            p_a = lower_confidence_bound(before.sum(1), old.shape[1], alpha)
            bound[some] = (p_a - zeta[some]).clamp(min=0)
        elif method == PAIRED:
            votes, before = before.sum(1), before[:, :new.shape[1]]
            both = (before & after).sum(1)
            lost, gained = (before & inside).sum(1) - both, after.sum(1) - both
            difference[some] = (gained - lost) / m.double()
            bound[some] = paired_lower_bound(both, lost, gained, m, votes - both - lost, old.shape[1] - m,
                                             alpha + alpha_zeta, plan.bet[some])
    return bound, zeta, difference


def certify_incremental(classifier: Classifier, cache: ReplayCache, images: Tensor, n_p: int,
                        alpha_zeta: float, gamma: float = 0.99, mode: str = "auto",
                        both_sides: bool = False, batch_size: int = 100) -> list[IncrementalCertificate]:
    """Certify a changed classifier f^P with n_p samples an image, on average, instead of n.

    images: (B, C, H, W), those of the cache. For each image, with probability at least 1 - (alpha +
    alpha_zeta), g^P predicts `predict` within `radius`, for an f^P, n_p, mode fixed without looking at this
    noise: a search that compares many f^P on one cache scores them, and its winner needs a new certificate.
    Images whose cached class is wrong cost nothing and count 0. both_sides gives Theorem 2.1's two-sided
    radius, each side at half of every share of alpha; otherwise p_B = 1 - p_A.

    off     n_p fresh samples, one bound at alpha + alpha_zeta
    paper   IRS (Ugare et al., Algorithm 2). Where p_A < gamma: p_A - zeta, with zeta the bound of P[f != f^P]
            on n_p replayed samples. p_A fails with probability alpha, zeta with alpha_zeta; by the union
            bound they may share samples. Elsewhere as off
    paired  `paired_lower_bound` on n_p replayed samples, a twentieth of them a pilot
    auto    n_p passes for every image of right class, shared out by `plan_passes`, each by its best method

    Why paired and auto hold: plan and pilot see the first tenth of the cached samples, the bounds the others
    and fresh noise. Given the plan, every image has one bound of one size, fixed before its samples were
    seen, that fails with probability at most alpha + alpha_zeta. paper's branch depends on the p_A bound that
    it then uses: below gamma a fresh branch means that this bound failed, so alpha + alpha_zeta holds;
    elsewhere failure is at most alpha + 2 alpha_zeta (both_sides: 1.5 (alpha + alpha_zeta) in either case).
    Raises ValueError for an unknown mode, impossible alphas, and n_p beyond the cached samples (half of them
    if paired).
    """
    n = cache.predictions.shape[1]
    sigma, alpha = cache.certificates[0].sigma, cache.certificates[0].alpha
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if not (alpha_zeta > 0 and alpha + alpha_zeta < 1):
        raise ValueError(f"alpha + alpha_zeta = {alpha} + {alpha_zeta} must be positive and stay below 1")
    if n_p > n or mode == "paired" and 2 * n_p > n:
        raise ValueError(f"n_p = {n_p} exceeds {'half of ' * (mode == 'paired')}the {n} cached samples")
    selected = torch.tensor([row.selected for row in cache.certificates])
    right = selected == torch.tensor([row.label for row in cache.certificates])
    sample = certify._sampler(classifier, cache, images, batch_size)
    if mode in ("off", "paper"):
        n_a = torch.tensor([row.n_a for row in cache.certificates])
        replay = (lower_confidence_bound(n_a, n, alpha) < gamma) & (mode == "paper")
        nothing = torch.zeros_like(n_a)
        plan = Plan(torch.where(replay, PAPER, FRESH) * right, n_p * right, nothing, nothing.double(), 0)
    else:
        plan = plan_passes(cache, sample, selected, right, n_p, alpha, alpha_zeta, mode == "auto")
    replayed = sample(plan.passes * (plan.method >= PAPER), cache.key, plan.first)
    fresh = sample(plan.passes * (plan.method == FRESH), cache.key.derive("fresh"), 0)
    votes = plan, cache.predictions[:, plan.first:], replayed, fresh

    sides = 2 if both_sides else 1
    p_lower, zeta, difference = _lower_bounds(*votes, selected, True, alpha / sides, alpha_zeta / sides)
    p_upper = 1 - p_lower
    if both_sides:  # the largest bound of any other class; -1 stands for the classes that nobody predicted
        p_upper = torch.zeros_like(p_lower)
        for other in [-1, *torch.cat([part.unique() for part in votes[1:]]).unique().tolist()]:
            bound = 1 - _lower_bounds(*votes, torch.full_like(selected, other), False, alpha / sides,
                                      alpha_zeta / sides)[0]
            p_upper = torch.where(selected == other, p_upper, torch.maximum(p_upper, bound))
    radius = torch.where(right, certified_radius(p_lower, sigma, p_upper), 0.0)
    columns = radius, plan.method, plan.passes + plan.pilot, zeta, difference
    return [IncrementalCertificate(row.idx, row.label, row.selected if radius > 0 else ABSTAIN, radius,
                                   int(radius > 0), METHODS[method], *rest)
            for row, radius, method, *rest in zip(cache.certificates, *(part.tolist() for part in columns))]
