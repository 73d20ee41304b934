"""Sharper incremental certificates than IRS: a paired bound, and passes planned where they buy radius.

Beyond the paper: `certify.Smooth.certify_incremental` is IRS. `certify_incremental` here takes a mode, too:
off, paper (IRS again), paired or auto. `benchmarks/certificates.py` measures them.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import certify
from certify import ReplayCache, Smooth, certified_radius, lower_confidence_bound, upper_confidence_bound

MODES = ("off", "paper", "paired", "auto")
METHODS = ("none", "fresh", "paper", "paired")
NONE, FRESH, PAPER, PAIRED = range(4)


@dataclass
class IncrementalCertificate:
    """One image certified for f^P, as in certify.py. method: one of METHODS; passes include a pilot's."""

    idx: int
    label: int
    predict: int
    radius: float
    correct: int
    method: str
    passes: int
    zeta: float  # nan unless paper
    difference: float  # P[f^P = c_A] - P[f = c_A] on the replayed samples; nan unless paired


# ---- the paired bound ----


def paired_lower_bound(
    both: Tensor, lost: Tensor, gained: Tensor, m: Tensor, k: Tensor, n: Tensor, alpha: float, bet: Tensor
) -> Tensor:
    """Lower confidence bound (B,) of P[G], from m samples of F and G together and n others of F alone.

    F and G are the events f = c and f^P = c; `both`, `lost` and `gained` count samples where both, only F
    and only G hold; k of the n others have F. P[bound <= P[G]] >= 1 - alpha. With w = n / (n + m):

        P[G] = t + w P[F] with t = E[G - wF], for any w.
        The m samples bet on t: under E[G - wF] <= t, the wealth e(t) = prod_i 1 + bet (G_i - w F_i - t) has
        expectation at most 1, for a bet fixed in advance that leaves no factor negative.
        The n others give a p-value for P[F] <= p: the binomial tail q(p) of k or more among n.
        They share no sample, so P[q <= alpha e] <= E[min(1, alpha e)] <= alpha at the true t and p.
        Otherwise p is at least LCB(k, n, alpha e(t)), and P[G] = t + w p at least the minimum of
        t + w LCB(k, n, alpha e(t)) over all t.

    All of alpha is spent on this one comparison. e falls with t, so taking t from one end of a cell of a
    grid and e from the other errs downwards only.
    """
    both, lost, gained, m, k, n, bet = (part.double()[:, None] for part in (both, lost, gained, m, k, n, bet))
    w = n / (n + m)
    mean = (gained + (1 - w) * both - w * lost) / m
    square = (gained + (1 - w) ** 2 * both + w**2 * lost) / m
    spread = ((square - mean**2).clamp(min=0) / m).sqrt() + 1 / m
    offsets = torch.linspace(-5.3, 5.3, 161).sinh()  # dense near the mean, where the minimum lies
    t = (mean + spread * offsets).clamp(max=1).maximum(-w)
    t = torch.cat([-w, t, torch.ones_like(w)], 1)
    size = torch.minimum(bet, 0.9 / (w + t).clamp(min=1e-12))
    outcomes = (both, 1 - w), (lost, -w), (gained, 1), (m - both - lost - gained, 0)
    wealth = sum(count * torch.log1p(size * (value - t)) for count, value in outcomes)
    # A hundredth stays out of the bet: wealth lost on a t far off must not stop the others from excluding it.
    level = alpha * (0.99 * wealth.clamp(max=700).exp() + 0.01)[:, 1:]
    p = lower_confidence_bound(k, n, level.clamp(max=0.999999))
    return torch.where(level >= 1, math.inf, t[:, :-1] + w * p).amin(1).clamp(0, 1)


# ---- the plan of the passes ----


class Plan(NamedTuple):
    """What each image gets, fixed before any bound is computed; all (B,) but `first`."""

    method: Tensor  # index into METHODS
    passes: Tensor  # samples of f^P for the bound
    pilot: Tensor  # samples of f^P for the plan itself
    bet: Tensor  # of the paired bound
    first: int  # bounds use cached samples from this one on


def plan_passes(
    cache: ReplayCache,
    sample: Callable,
    selected: Tensor,
    right: Tensor,
    n_p: int,
    alpha: float,
    alpha_zeta: float,
    share_out: bool,
) -> Plan:
    """Plan n_p passes per image of right class; share_out: so that the expected sum of radii is largest.

    Reads only the first tenth of the cached samples. f's votes there tell how certain each image is. A
    pilot, a twentieth of the passes, is replayed there: it tells how often the vote for c_A changes per
    unit of its variance p (1 - p), an image's own rate drawn towards that of all.
    sample(sizes, key, first) gives f^P's predictions.
    """
    n = cache.predictions.shape[1]
    first = n // 10
    rest = n - first
    votes = (cache.predictions[:, :first] == selected[:, None]).sum(1)
    p = (votes.double() + 0.5) / (first + 1)
    variance = p * (1 - p)
    pilot = min(first, n_p // 20) * right
    replayed = sample(pilot, cache.key, 0)
    inside = torch.arange(replayed.shape[1]) < pilot[:, None]
    before = inside & (cache.predictions[:, : replayed.shape[1]] == selected[:, None])
    after = inside & (replayed == selected[:, None])
    lost, gained = (before & ~after).sum(1), (after & ~before).sum(1)
    units = pilot * variance
    change = (lost.sum() + gained.sum() + 1) / (units.sum() + 1)  # without a pilot, every vote may change
    shift = (gained.sum() - lost.sum()) / (units.sum() + 1)
    # Images differ by about half of what changes; each one's own pilot counts as it can tell more than that.
    spread = variance * change**2 / 4
    own = spread * pilot / (spread * pilot + change)
    shift = own * (gained - lost) / pilot.clamp(min=1) + (1 - own) * shift * variance
    change = (lost + gained + 5 * change) / (units + 5)

    def paired_variance(m: Tensor) -> Tensor:
        """Variance of G - wF (see `paired_lower_bound`), and a margin for what m samples cannot rule out."""
        w = 1 - m / rest
        return ((1 - w) ** 2 + w * change[:, None]) * variance[:, None] + 1 / m

    method = PAIRED * right
    passes = (n_p - pilot) * right
    if share_out:
        sizes = torch.logspace(1, max(1.0, math.log10(rest)), 20).long().unique().double()
        p = (p + shift).clamp(0.5 / (first + 1), 1 - 0.5 / (first + 1))
        weight = 1 / (1 / (first + 1) + spread * (1 - own))
        w = 1 - sizes / rest
        effective = 1 / (w / rest + 1.2 * paired_variance(sizes) / (variance[:, None] * sizes))
        changed = (change * variance).clamp(max=1)[:, None] * sizes
        zeta = upper_confidence_bound(changed, sizes, alpha_zeta)
        total, ones = alpha + alpha_zeta, torch.ones_like(effective)
        fresh = expected_radius(p, weight, ones * sizes, total)
        paper = expected_radius(p, weight, ones * rest, alpha, zeta)
        paired = expected_radius(p, weight, effective, total) * (sizes <= rest / 2)
        gain, method = torch.stack([fresh, paper, paired]).max(0)
        method, passes = _share_out(gain * right[:, None], FRESH + method, sizes.long(), int(passes.sum()))
        passes = torch.minimum(passes, torch.where(method == PAIRED, rest // 2, rest))
    m = passes.clamp(min=1).double()[:, None]
    bet = (7 / (m * paired_variance(m))).sqrt().squeeze(1)
    return Plan(method, passes, pilot, bet, first)


def expected_radius(p: Tensor, weight: Tensor, samples: Tensor, alpha: float, loss=0.0) -> Tensor:
    """Mean radius over sigma (B, S) that `samples` (B, S) will certify at alpha, less `loss` off the bound.

    p (B,) is known as from `weight` (B,) samples; the mean is over six quantiles of a beta distribution.
    """
    p, weight, samples = p[:, None, None], weight[:, None, None], samples.clamp(min=2)[..., None]
    size = samples * (weight + 1) / (weight + samples) - 1
    quantiles = (torch.arange(6) + 0.5) / 6
    votes = torch.as_tensor(beta.ppf(quantiles, p * size, (1 - p) * size)) * samples
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


# ---- certificates ----


def certify_incremental(
    g: Smooth,
    images: Tensor,
    cache: ReplayCache,
    n_p: int,
    alpha_zeta: float = 0.001,
    gamma: float = 0.99,
    mode: str = "auto",
    both_sides: bool = False,
) -> list[IncrementalCertificate]:
    """Certify a changed classifier f^P, smoothed by g, with n_p samples per image, on average, instead of n.

    images: (B, C, H, W), those of the cache. For each image, with probability at least 1 - (alpha +
    alpha_zeta), g^P predicts `predict` within `radius`, for an f^P, n_p and mode fixed without looking at
    this noise: a search that compares many f^P on one cache scores them, and its winner needs a
    certificate of its own. Images whose cached class is wrong cost nothing and count 0. both_sides gives
    Theorem 2.1's two-sided radius, each side at half of every share of alpha; otherwise p_B = 1 - p_A.

    off     n_p fresh samples, one bound at alpha + alpha_zeta
    paper   IRS, as `certify.Smooth.certify_incremental` has it: below gamma p_A - zeta, elsewhere n_p fresh
            samples at alpha
    paired  `paired_lower_bound` on n_p replayed samples, a twentieth of them a pilot
    auto    n_p passes for every image of right class, shared out by `plan_passes`, each by its best method

    Why off, paired and auto hold: plan and pilot see the first tenth of the cached samples, the bounds the
    others and fresh noise. Given the plan, every image has one bound of one size, fixed before its samples
    were seen, that fails with probability at most alpha + alpha_zeta.

    paper's branch depends on the p_A bound that it then uses. One-sided, alpha + alpha_zeta holds in every
    case, as proved there. both_sides, a certificate fails with at most 1.5 alpha + alpha_zeta / 2, which is
    within alpha + alpha_zeta if alpha <= alpha_zeta. The two sides share one zeta, and:
        if truly p_A >= gamma, a replay has a valid p_A and fails by p_B (alpha / 2) or zeta
        (alpha_zeta / 2), and a fresh bound by either side (alpha);
        if p_A < gamma, a replay fails by p_A, p_B or zeta (alpha + alpha_zeta / 2), and a fresh branch
        needs f's bound to fail (alpha) and then one of its own, on other noise (alpha): alpha^2.

    Raises ValueError for an unknown mode, impossible alphas, another sigma than f's, and n_p beyond the
    cached samples (half of them if paired).
    """
    rows = cache.certificates
    n = cache.predictions.shape[1]
    sigma, alpha = rows[0].sigma, rows[0].alpha
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
    if sigma != g.sigma:
        raise ValueError(f"the cache has sigma {sigma}, this classifier {g.sigma}")
    if not (alpha_zeta > 0 and alpha + alpha_zeta < 1):
        raise ValueError(f"alpha + alpha_zeta = {alpha} + {alpha_zeta} must be positive and stay below 1")
    if n_p > (n // 2 if mode == "paired" else n):
        raise ValueError(f"n_p = {n_p} exceeds {'half of ' * (mode == 'paired')}the {n} cached samples")
    selected = torch.tensor([row.selected for row in rows])
    right = selected == torch.tensor([row.label for row in rows])
    sample = functools.partial(g.predictions, images, [row.idx for row in rows])
    if mode in ("off", "paper"):
        n_a = torch.tensor([row.n_a for row in rows])
        replay = (lower_confidence_bound(n_a, n, alpha) < gamma) & (mode == "paper")
        nothing = torch.zeros_like(n_a)
        method = torch.where(replay, PAPER, FRESH) * right
        plan = Plan(method, n_p * right, nothing, nothing.double(), 0)
    else:
        plan = plan_passes(cache, sample, selected, right, n_p, alpha, alpha_zeta, mode == "auto")
    old = cache.predictions[:, plan.first :]
    replayed = sample(plan.passes * (plan.method >= PAPER), cache.key, plan.first)
    fresh = sample(plan.passes * (plan.method == FRESH), cache.key + "/fresh")
    votes = plan, old, replayed, fresh

    fresh_alpha = alpha if mode == "paper" else alpha + alpha_zeta
    sides = 2 if both_sides else 1
    alphas = alpha / sides, alpha_zeta / sides, fresh_alpha / sides
    p_lower, zeta, difference = _lower_bounds(*votes, selected, True, *alphas)
    p_upper = 1 - p_lower
    if both_sides:  # the largest bound of any other class; -1 stands for the classes that nobody predicted
        p_upper = torch.zeros_like(p_lower)
        for other in [-1, *torch.cat([part.unique() for part in votes[1:]]).unique().tolist()]:
            bound = 1 - _lower_bounds(*votes, torch.full_like(selected, other), False, *alphas)[0]
            p_upper = torch.where(selected == other, p_upper, torch.maximum(p_upper, bound))
    radius = torch.where(right, certified_radius(p_lower, sigma, p_upper), 0.0)
    return [
        IncrementalCertificate(
            idx=row.idx,
            label=row.label,
            predict=row.selected if radius[i] > 0 else certify.ABSTAIN,
            radius=float(radius[i]),
            correct=int(radius[i] > 0),
            method=METHODS[plan.method[i]],
            passes=int(plan.passes[i] + plan.pilot[i]),
            zeta=float(zeta[i]),
            difference=float(difference[i]),
        )
        for i, row in enumerate(rows)
    ]


def _lower_bounds(
    plan: Plan,
    old: Tensor,
    replayed: Tensor,
    fresh: Tensor,
    classes: Tensor,
    is_class: bool,
    alpha: float,
    alpha_zeta: float,
    fresh_alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds (B,) of P[f^P = class], or of != where `is_class` is false; with zeta and difference."""
    bound = torch.zeros(len(old), dtype=torch.float64)
    zeta, difference = torch.full((2, len(old)), math.nan, dtype=torch.float64)
    for method in plan.method.unique().tolist():
        some = plan.method == method
        m, c = plan.passes[some], classes[some, None]
        new = fresh[some] if method == FRESH else replayed[some]
        inside = torch.arange(new.shape[1]) < m[:, None]
        after = inside & ((new == c) == is_class)
        before = (old[some] == c) == is_class
        if method == FRESH:
            bound[some] = lower_confidence_bound(after.sum(1), m, fresh_alpha)
        elif method == PAPER:
            changed = (inside & (new != old[some, : new.shape[1]])).sum(1)
            zeta[some] = upper_confidence_bound(changed, m, alpha_zeta)
            p_a = lower_confidence_bound(before.sum(1), old.shape[1], alpha)
            bound[some] = (p_a - zeta[some]).clamp(min=0)
        elif method == PAIRED:
            votes, before = before.sum(1), before[:, : new.shape[1]]
            both = (before & after).sum(1)
            lost = (before & inside).sum(1) - both
            gained = after.sum(1) - both
            difference[some] = (gained - lost) / m.double()
            others = votes - both - lost, old.shape[1] - m
            total = alpha + alpha_zeta
            bound[some] = paired_lower_bound(both, lost, gained, m, *others, total, plan.bet[some])
    return bound, zeta, difference
