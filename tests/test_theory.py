"""
Why RPO's SFT term is an adversary: the paper's Algorithm 1, in worlds small enough to be solved exactly (float64).

    pytest tests/test_theory.py -q            # the checks
    python tests/test_theory.py               # the numbers as a table, and the picture: assets/theory.png

A world has X prompts and K actions each. S data sets are worked on at once, so tensors start with S.
    wins (S, X, K, K)       share of the data's pairs in which, under prompt x, action i was chosen over j; sums to 1
    base (S, X, K)          p(x) * pi_base(a|x); for the chosen responses as the baseline: wins.sum(-1)
    reference (X, K)        log pi_ref(a|x)
    policy (S, X, K)        probabilities pi(a|x)
    r (S, X, K)             a reward of each action, bounded: |r| <= bound
Algorithm 1 plays  max over policies, min over bounded rewards, of
    phi(pi, r) = eta * sum_x p(x) { E_{a~pi}[r(x,a)] - E_{a0~pi_base}[r(x,a0)] - beta KL(pi(.|x) || pi_ref(.|x)) }
                 + L(r),
    L(r) = mean over pairs of -log sigmoid(r(x, chosen) - r(x, rejected)),
so the adversary lowers the reward of what the policy does, against the baseline's, as far as the data can stand it.
"""
import argparse
import functools
import math
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from rpo import rpo_loss  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The problems are many and tiny: a second thread only waits, and on busy cores slows everything down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# ---------------------------------------------------------------------------------------------------------------------
# data sets

def compared(weights):
    """How pairs are drawn: both actions by the same weights (K,), never an action with itself -> (1, K, K)."""
    weights = np.asarray(weights, dtype=float)
    pairs = np.outer(weights, weights) * (1 - np.eye(len(weights)))
    return (pairs / pairs.sum())[None]


def sample_wins(rng, number, pairs, rewards, sets):
    """Bradley-Terry pairs, drawn with probabilities pairs (X, K, K), labelled by rewards (X, K) -> (sets, X, K, K)."""
    odds = pairs / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))  # i compared with j, and i beats j
    counts = rng.multinomial(number, odds.ravel() / odds.sum(), size=sets)
    return torch.tensor(counts.reshape(sets, *pairs.shape) / number)

# ---------------------------------------------------------------------------------------------------------------------
# the objectives

def mle_loss(r, wins):
    """L(r), (S,): the mean over pairs of -log sigmoid(r(chosen) - r(rejected))."""
    return -(wins * F.logsigmoid(r[..., :, None] - r[..., None, :])).sum((1, 2, 3))


def phi(policy, r, wins, base, reference, beta, eta):
    """Algorithm 1's objective, (S,): concave in the policy (linear minus KL), convex in r (linear plus L)."""
    prompts = base.sum(-1, keepdim=True)  # (S, X, 1) p(x)
    kl = policy * (policy.log() - reference)  # (S, X, K), summed over K below
    return eta * (prompts * (policy * r - beta * kl) - base * r).sum((1, 2)) + mle_loss(r, wins)


def rpo_objective(logps, wins, reference, beta, eta, baseline=None):
    """The mean of rpo_loss over the pairs, (S,): all X * K * K possible pairs are rows, weighted by their share.

    logps (S, X, K): log pi(a|x). baseline (S, X, K): pi_base(a|x) where it is not the distribution of the chosen
    responses; the SFT term is linear in log pi(a0|x), so a pair's expectation over a0 can be handed over as its
    baseline log-prob."""
    sets, prompts, actions = logps.shape

    def pairs(table):  # (S, X, K) -> (S * X * K * K, 2) [chosen, rejected]
        shape = (sets, prompts, actions, actions)
        return torch.stack((table[..., :, None].expand(shape), table[..., None, :].expand(shape)), -1).reshape(-1, 2)

    if baseline is not None:
        baseline = (baseline * logps).sum(-1)[..., None, None].expand_as(wins).reshape(-1)
    losses, _ = rpo_loss(pairs(logps), pairs(reference.expand_as(logps)), torch.ones(wins.numel()), beta=beta, eta=eta,
                         sft="sum", baseline_logps=baseline)
    return (losses.view_as(wins) * wins).sum((1, 2, 3))

# ---------------------------------------------------------------------------------------------------------------------
# solvers: Newton on S small problems at once; derivatives by autograd, so no formula of the theory is built in

def derivatives(f, z):
    """f: (S, P) -> (S,), each row on its own. Gradient (S, P) and Hessian (S, P, P)."""
    z = z.detach().requires_grad_()
    gradient, = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in gradient.unbind(-1)]
    return gradient.detach(), torch.stack(rows, 1)


def backtrack(z, step, accept, shrink=0.5):
    """The longest step of 1, shrink, shrink^2, ... that accept(candidate, t) allows, for each row on its own."""
    t = torch.ones_like(z[:, :1])
    for _ in range(60):
        good = accept(z + t * step, t[:, 0])
        if good.all():
            break
        t = torch.where(good[:, None], t, shrink * t)
    return t


def minimise(f, start, bound=math.inf, tolerance=1e-9, limit=300):
    """argmin of a convex f over |z| <= bound, (S, P): Newton's method without the coordinates held at the bound."""
    z = start
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    for _ in range(limit):
        gradient, hessian = derivatives(f, z)
        held = ((z >= bound) & (gradient < 0)) | ((z <= -bound) & (gradient > 0))
        gradient = gradient.masked_fill(held, 0)
        if gradient.abs().max() < tolerance:
            return z
        hessian = hessian.masked_fill(held[:, :, None] | held[:, None, :], 0) + torch.diag_embed(held.double())
        # the ridge, because adding a constant to all rewards of a prompt changes nothing
        step = -torch.linalg.solve(hessian + 1e-10 * eye, gradient)
        value = f(z).detach()

        def lower(candidate, t):
            candidate = candidate.clamp(-bound, bound)
            return f(candidate) <= value + 1e-4 * (gradient * (candidate - z)).sum(-1) + 1e-15

        with torch.no_grad():
            z = (z + backtrack(z, step, lower) * step).clamp(-bound, bound)
    raise AssertionError(f"no convergence: gradient {gradient.abs().max():.1e}")


def solve_rpo(wins, reference, beta, eta, baseline=None, bound=math.inf):
    """The minimum of rpo_loss over policies pi_r(a|x) ~ pi_ref(a|x) exp(r(x,a) / beta), |r| <= bound; without a bound
    these are all policies. The start is r = 0, the reference, as in training. eta = 0 is DPO, r then the MLE reward.
    Returns policy (S, X, K), r (S, X, K), value (S,)."""
    def objective(r):
        logps = (reference + r.view(wins.shape[:3]) / beta).log_softmax(-1)
        return rpo_objective(logps, wins, reference, beta, eta, baseline)

    r = minimise(objective, torch.zeros(len(wins), reference.numel(), dtype=torch.float64), bound)
    return (reference + r.view(wins.shape[:3]) / beta).softmax(-1), r.view(wins.shape[:3]), objective(r)


def solve_algorithm_1(wins, base, reference, beta, eta, bound):
    """The saddle point (policy, r) of phi, each (S, X, K), by Newton's barrier method for convex-concave games.

    Sought is the root of the gradient of  phi + nu (1 - sum_a pi) - mu sum log(bound^2 - r^2)  in (pi, r, nu) jointly,
    for mu -> 0: the logarithm keeps r inside its box, the multiplier nu keeps pi a distribution, steps in log pi keep
    it positive. Whether what comes out is a saddle point is not taken from here: the test certifies it from both
    sides."""
    sets, (prompts, actions) = len(wins), reference.shape
    size = prompts * actions
    start = reference.flatten().expand(sets, -1)
    z = torch.cat((start, torch.zeros(sets, size + prompts, dtype=torch.float64)), 1)  # (S, 2 X K + X): log pi, r, nu

    def natural(z):  # log pi -> pi; the game is concave in pi, not in log pi
        return torch.cat((z[:, :size].exp(), z[:, size:]), 1)

    for mu in torch.logspace(-1, -9, 9, dtype=torch.float64):
        def lagrangian(z):
            policy, r = z[:, :2 * size].view(-1, 2, prompts, actions).unbind(1)
            off = 1 - policy.sum(-1)
            return (phi(policy, r, wins, base, reference, beta, eta) + (z[:, 2 * size:] * off).sum(1)
                    - mu * (bound ** 2 - r ** 2).log().sum((1, 2)))

        def residual(z):
            z = natural(z).requires_grad_()
            return torch.autograd.grad(lagrangian(z).sum(), z)[0].norm(dim=1)

        for _ in range(100):
            now = residual(z)
            if now.max() < mu:
                break
            gradient, hessian = derivatives(lagrangian, natural(z))
            chain = torch.cat((z[:, :size].exp(), torch.ones_like(z[:, size:])), 1)  # d pi = pi d log pi
            step = -torch.linalg.solve(hessian * chain[:, None, :], gradient)

            def nearer(candidate, t):
                inside = (candidate[:, size:2 * size].abs() < bound).all(1)
                new = residual(torch.where(inside[:, None], candidate, z))
                return inside & ((new <= (1 - 0.1 * t) * now) | (now < mu))

            z = z + backtrack(z, step, nearer) * step
        else:
            raise AssertionError(f"no convergence at mu {mu:.0e}: {now.max():.1e}")
    return natural(z)[:, :2 * size].view(-1, 2, prompts, actions).unbind(1)

# ---------------------------------------------------------------------------------------------------------------------
# (a), (b): the saddle point, and RPO's minimum

BOUND = 8.0


@functools.cache
def small_world():
    """40 data sets of 60 pairs: 3 prompts x 4 actions, of which prompt 0 never sees the last one, prompt 1 rarely,
    prompt 2 often."""
    rng = np.random.default_rng(0)
    rewards = rng.uniform(-1, 1, (3, 4))
    reference = torch.tensor(rng.normal(size=(3, 4))).log_softmax(-1)
    pairs = np.concatenate([compared(w) for w in ([.5, .4, .1, 0], [.4, .4, .15, .05], [.25, .25, .25, .25])]) / 3
    return sample_wins(rng, 60, pairs, rewards, 40), reference


def primal_value(policy, wins, base, reference, beta, eta, bound):
    """min over |r| <= bound of phi(policy, r), (S,), from below. phi is convex in r, so it lies above its tangent at
    the r found, and the least value of a tangent over a box is a sum of absolute values: a lower bound on max-min,
    however good that r is."""
    def f(r):
        return phi(policy, r.view_as(policy), wins, base, reference, beta, eta)

    r = minimise(f, torch.zeros(len(wins), reference.numel(), dtype=torch.float64), bound)
    gradient, _ = derivatives(f, r)
    return f(r) - (gradient * r + gradient.abs() * bound).sum(-1)


def dual_value(r, wins, base, reference, beta, eta):
    """max over policies of phi(policy, r), (S,): an upper bound on min-max. The maximum of E_pi[r] - beta KL(pi || ref)
    is beta log sum_a ref e^(r / beta)."""
    best = base.sum(-1) * beta * (reference + r / beta).logsumexp(-1)  # (S, X)
    return eta * (best - (base * r).sum(-1)).sum(-1) + mle_loss(r, wins)


SETTINGS = ((0.1, 0.1), (0.1, 1.0), (0.5, 0.5))  # beta, eta


@pytest.mark.parametrize("beta, eta", SETTINGS)
def test_algorithm_1_has_no_duality_gap(beta, eta):
    """(a) max_pi min_r phi = min_r max_pi phi.

    phi is concave in pi (linear, minus eta beta KL) and convex in r (linear, plus L, which is convex); the simplices
    and the box |r| <= bound are convex and compact, phi is continuous: by Sion's theorem max and min may be swapped.
    Numerically: for *any* policy and reward
        min_r phi(policy, .)  <=  max min  <=  min max  <=  max_pi phi(., r),
    and at the solution found the two ends, computed apart from each other and from the solver, differ by less than
    1e-6.
    """
    wins, reference = small_world()
    base = wins.sum(-1)
    game = (wins, base, reference, beta, eta)
    policy, r = solve_algorithm_1(*game, BOUND)
    assert (policy.sum(-1) - 1).abs().max() < 1e-8 and r.abs().max() <= BOUND
    max_min, min_max = primal_value(policy, *game, BOUND), dual_value(r, *game)
    assert (min_max - max_min).min() > -1e-12 and (min_max - max_min).max() < 1e-6

    # the bounds are bounds: no other policy does better, no other reward hurts more, the closed form is the maximum
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0):
        other_policy = (policy.log() + torch.tensor(rng.normal(size=policy.shape, scale=scale))).softmax(-1)
        other_r = (r + torch.tensor(rng.normal(size=r.shape, scale=scale))).clamp(-BOUND, BOUND)
        assert (primal_value(other_policy, *game, BOUND) < max_min).all()
        assert (dual_value(other_r, *game) > min_max).all()
        assert (phi(other_policy, r, *game) < min_max).all()
        best = (reference + other_r / beta).softmax(-1)
        assert torch.allclose(phi(best, other_r, *game), dual_value(other_r, *game), atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta, eta, baseline", [(*s, "chosen") for s in SETTINGS] + [(0.1, 0.3, "another policy")])
def test_rpo_is_algorithm_1(beta, eta, baseline):
    """(b) Algorithm 1's policy is the minimiser of rpo_loss, and max-min = min rpo_loss + eta beta E_base[log pi_ref].

    1. Swap (test above): max_pi min_r phi = min_r max_pi phi.
    2. Inner optimum: at a fixed r,  max_pi E_pi[r] - beta KL(pi || ref)  is attained by pi_r ~ ref exp(r / beta) and
       equals beta log Z_r(x). That same pi_r says r(x,a) = beta log(pi_r(a|x) / ref(a|x)) + beta log Z_r(x).
    3. Cancel: in L only differences of r at one x occur, so log Z_r(x) drops out and L is DPO's loss. KL and E_pi[r]
       are spent (they made beta log Z_r); what is left of the game, eta E_base[beta log Z_r - r], is
       eta beta E_base[log ref - log pi_r]: log Z_r drops out here too.
    So  min_r max_pi phi = min_pi { DPO loss + eta beta E_base[-log pi] } + eta beta E_base[log ref]:
    the SFT term is what the adversary leaves.

    The bound on r: an action that the baseline takes has a finite r at the optimum (the SFT term holds it up, tested:
    no two differ by 2 * bound), so the bound is idle. An action that it never takes the adversary pushes as far down as
    it may: to -bound here, to -infinity without a bound; its probability is e^(-bound / beta) or 0, and both are 0 to
    the digits tested.
    """
    wins, reference = small_world()
    mimic = None
    if baseline == "another policy":
        mimic = (reference + torch.linspace(-1, 1, 4, dtype=torch.float64)).softmax(-1).expand(40, 3, 4)
    base = wins.sum(-1) if mimic is None else wins.sum((2, 3))[..., None] * mimic
    policy, r = solve_algorithm_1(wins, base, reference, beta, eta, BOUND)
    rpo_policy, rpo_r, rpo_value = solve_rpo(wins, reference, beta, eta, mimic)

    assert (policy - rpo_policy).abs().max() < 1e-4
    constant = eta * beta * (base * reference).sum((1, 2))
    assert (phi(policy, r, wins, base, reference, beta, eta) - (rpo_value + constant)).abs().max() < 1e-6
    taken = base > 0
    spread = rpo_r.masked_fill(~taken, -math.inf).amax(-1) - rpo_r.masked_fill(~taken, math.inf).amin(-1)
    assert spread.max() < 2 * BOUND
    assert policy[~taken].sum() < 1e-6  # what the baseline never does, Algorithm 1 does not do either
    # neither the reference nor the baseline nor DPO happens to be that policy
    dpo, _, _ = solve_rpo(wins, reference, beta, 0.0, bound=BOUND)
    for other in (reference.exp(), base / base.sum(-1, keepdim=True), dpo):
        assert (policy - other).abs().amax((1, 2)).min() > 1e-3


def test_a_bound_that_binds():
    """(b) with rewards bounded so tightly (0.3) that the data would like larger ones: Algorithm 1 then is RPO over the
    policies that such rewards induce, |beta log(pi / ref) + const(x)| <= 0.3, and no longer RPO over all policies. The
    equivalence needs the bound idle or shared."""
    wins, reference = small_world()
    base, beta, eta, bound = wins.sum(-1), 0.1, 0.1, 0.3
    policy, r = solve_algorithm_1(wins, base, reference, beta, eta, bound)
    game = (wins, base, reference, beta, eta)
    assert (dual_value(r, *game) - primal_value(policy, *game, bound)).max() < 1e-6
    shared, _, value = solve_rpo(wins, reference, beta, eta, bound=bound)
    free, _, _ = solve_rpo(wins, reference, beta, eta)
    assert (policy - shared).abs().max() < 1e-4 and (policy - free).abs().amax((1, 2)).min() > 1e-2
    assert (phi(policy, r, *game) - value - eta * beta * (base * reference).sum((1, 2))).abs().max() < 1e-6

# ---------------------------------------------------------------------------------------------------------------------
# (c): overoptimisation

TRUE = np.array([[1.0, 0.4, -0.2, -1.0, -1.0, -1.0, -1.0, -1.0]])  # one prompt, eight actions
RARE_IS_GOOD = np.array([[0.4, 0.1, -0.2, 1.0, 1.0, 1.0, 1.0, 1.0]])
THIN = np.array([0.4, 0.33, 0.25] + 5 * [0.004])  # the last five come up in 0.8% of the pairs each
# how often each action is compared, the true rewards, the number of pairs
WORLDS = {"partial coverage": (THIN, TRUE, 200), "full coverage": (np.ones(8), TRUE, 2000),
          "full coverage, 16 x pairs": (np.ones(8), TRUE, 32000), "partial, rare is good": (THIN, RARE_IS_GOOD, 200)}
BETA, SETS = 0.1, 400


@functools.cache
def overoptimisation(world, scale=0.5):
    """DPO (the MLE reward's policy) and RPO with eta = scale / sqrt(pairs). Per data set: wins (S, X, K, K);
    comparisons, policies, rewards (S, K); regret against the best action, mass on those compared at most twice (S,)."""
    weights, rewards, number = WORLDS[world]
    rng = np.random.default_rng(1)
    wins = sample_wins(rng, number, compared(weights), rewards, SETS)
    reference = torch.full((1, 8), -math.log(8), dtype=torch.float64)
    true, eta = torch.tensor(rewards), scale / math.sqrt(number)
    out = {"wins": wins, "reference": reference, "eta": eta,
           "comparisons": ((wins + wins.transpose(2, 3)).sum(-1) * number).round()[:, 0]}
    for name, weight, bound in (("dpo", 0.0, BOUND), ("rpo", eta, math.inf)):
        policy, r, _ = solve_rpo(wins, reference, BETA, weight, bound=bound)
        out[name], out[name + " reward"] = policy[:, 0], r[:, 0]
        out[name + " regret"] = true.max() - (policy * true).sum((1, 2))
        out[name + " thin mass"] = (policy[:, 0] * (out["comparisons"] <= 2)).sum(-1)
    base = wins.sum(-1)
    out["baseline regret"] = true.max() - (base * true).sum((1, 2))
    return out


def test_overoptimisation_under_partial_coverage():
    """(c) Five bad actions come up so rarely that one lucky label is all that is known of some: the maximum-likelihood
    reward of an action that won its only comparison is as high as the bound allows, and the policy built on it, DPO's,
    goes there. The adversary asks what the data would lose if that reward were low: one pair in N, against eta times
    the mass at stake, so the mass stays near 1 / (N eta)."""
    w = overoptimisation("partial coverage")
    fooled = w["dpo thin mass"] > 0.5
    assert 0.2 < fooled.double().mean() < 0.5
    # where DPO is fooled, the estimated reward is highest at an action whose true reward is the lowest there is
    spurious = w["dpo reward"][fooled].argmax(-1)
    assert (torch.tensor(TRUE[0])[spurious] == -1).all()
    assert w["rpo thin mass"].max() < 0.5 and w["rpo thin mass"].mean() < 0.1 * w["dpo thin mass"].mean()

    dpo, rpo = w["dpo regret"], w["rpo regret"]
    assert (rpo < dpo)[fooled].all()
    assert rpo.mean() < 0.25 * dpo.mean() and rpo.std() < 0.25 * dpo.std()
    assert rpo.mean() < 0.5 * w["baseline regret"].mean()
    # the premium: where nothing was spurious DPO is a little better, RPO leans towards the baseline
    assert 0 < (rpo - dpo)[~fooled].median() < 0.05

    # and Algorithm 1, not by the reduction
    policy, _ = solve_algorithm_1(w["wins"], w["wins"].sum(-1), w["reference"], BETA, w["eta"], BOUND)
    assert (policy[:, 0] - w["rpo"]).abs().max() < 1e-4


def test_an_action_never_compared():
    """(c) at its purest: with an action that no pair contains, every reward of it explains the data equally well. Give
    it a high one and the likelihood does not change while the MLE reward's policy moves there altogether; Algorithm 1
    and RPO play the worst of these rewards."""
    w = overoptimisation("partial coverage")
    sets, actions = torch.nonzero(w["comparisons"] == 0, as_tuple=True)
    assert len(sets) > 100
    wins, mle, its = w["wins"][sets], w["dpo reward"][sets], F.one_hot(actions, 8).bool()
    spurious = torch.where(its, mle.amax(-1, keepdim=True) + 1, mle)  # one above all others
    assert (mle_loss(spurious[:, None], wins) - mle_loss(mle[:, None], wins)).abs().max() < 1e-12
    assert (w["reference"] + spurious / BETA).softmax(-1)[its].min() > 0.99
    assert w["rpo"][sets][its].max() < 1e-6


def test_where_rpo_has_nothing_to_win():
    """With every action compared often there is nothing to fear: pessimism costs a premium that fades as N grows (eta ~
    1/sqrt(N)), so nothing is lost in the end. Where the rarely seen actions happen to be the good ones, pessimism is
    the wrong guess and loses to DPO: the theory promises to compete with what the data cover, no more."""
    full, more = overoptimisation("full coverage"), overoptimisation("full coverage, 16 x pairs")
    assert full["dpo thin mass"].max() == 0 and full["dpo regret"].mean() < 0.02
    premium, later = ((w["rpo regret"] - w["dpo regret"]).mean() for w in (full, more))
    assert 0 < later < 0.5 * premium and premium < 0.06 and later < 0.02
    rare = overoptimisation("partial, rare is good")
    assert rare["rpo regret"].mean() > rare["dpo regret"].mean() + 0.05

# ---------------------------------------------------------------------------------------------------------------------
# (d): the rate

NUMBERS = [64, 256, 1024, 4096, 16384, 65536]
GAPS = [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]  # what A and B differ by
SCHEDULES = {"eta = N^-1/2": lambda n: n ** -0.5, "eta = 1/8": lambda n: 1 / 8, "eta = 8/N": lambda n: 8 / n,
             "DPO, eta = 0": lambda n: 0.0}  # the first three agree at N = 64


@functools.cache
def regrets(schedule, seed=0, sets=200):
    """True regret (N, gap, data set) of RPO with beta = N^-1/2 and eta by schedule: A and B, `gap` apart, are compared
    N - 1 times; C, far below both, once."""
    rng = np.random.default_rng(seed)
    often, once = np.zeros((2, 1, 3, 3))
    often[0, 0, 1] = often[0, 1, 0] = 1
    once[0, 2, :2] = once[0, :2, 2] = 1
    reference = torch.full((1, 3), -math.log(3), dtype=torch.float64)
    result = np.zeros((len(NUMBERS), len(GAPS), sets))
    for i, n in enumerate(NUMBERS):
        rewards = [np.array([[gap / 2, -gap / 2, -1.0]]) for gap in GAPS]
        wins = torch.cat([((n - 1) * sample_wins(rng, n - 1, often, r, sets) + sample_wins(rng, 1, once, r, sets)) / n
                          for r in rewards])
        # the bound is for DPO, which has no minimum without one
        policy, _, _ = solve_rpo(wins, reference, n ** -0.5, SCHEDULES[schedule](n), bound=2.0)
        true = np.stack(rewards)
        result[i] = true.max(-1) - (policy.view(len(GAPS), sets, 3).numpy() * true).sum(-1)
    return result


def worst(regret):
    """(N, gap, data set) -> (N,): the mean over data sets at that gap where it is largest."""
    return regret.mean(-1).max(1)


def slope(regret, resamples=1000):
    """Least-squares slope of log(worst regret) on log(N), and its 95% interval from resampling the data sets."""
    def fit(mean):
        return np.polyfit(np.log(NUMBERS), np.log(mean.max(1)), 1)[0]

    sets = regret.shape[-1]
    shares = np.random.default_rng(0).multinomial(sets, np.full(sets, 1 / sets), size=resamples) / sets
    return fit(regret.mean(-1)), np.quantile([fit(regret @ share) for share in shares], [0.025, 0.975])


def test_the_gap_falls_like_one_over_sqrt_n():
    """(d) With eta ~ beta ~ 1/sqrt(N) the regret against the covered action falls like 1/sqrt(N), though one action
    stays uncovered.

    Let pi_hat be Algorithm 1's policy, r* the truth (inside the bound), J(pi) = E_pi[r*] - beta KL(pi || ref). For any
    policy pi
        eta (J(pi_hat) - E_base[r*]) + L(r*) = phi(pi_hat, r*) >= min_r phi(pi_hat, r) >= min_r phi(pi, r), so
        J(pi) - J(pi_hat) <= max_r { E_{pi, base}[(r*(a) - r*(a0)) - (r(a) - r(a0))] - (L(r) - L(r*)) / eta }.
    Let D(r) be the root mean square over the data's pairs of the error of r's differences. A bounded reward's
    likelihood is curved, L(r) - L(r*) >= k D(r)^2 - c/N with high probability; if the data cover pi against the
    baseline, the expectation is <= C D(r). Then
        J(pi) - J(pi_hat) <= max_D { C D - k D^2 / eta } + c / (N eta) = C^2 eta / (4 k) + c / (N eta),
    which eta ~ 1/sqrt(N) balances at 1/sqrt(N); beta ~ 1/sqrt(N) makes the KL in J as small. Only pi, the competitor,
    need be covered.

    The promise is for the worst instance at each N, so what is measured is the largest mean regret over a grid of gaps
    that does not depend on N. One fixed covered pair alone would show a faster fall: once its gap stands out of the
    noise, the wrong action is exponentially rare. C, compared once at every N, is the partial coverage. For DPO its
    lucky label is a constant loss. For Algorithm 1 its mass is of order 1 / (N eta): constant if eta ~ 1/N; with a
    constant eta it is the pull to the baseline that does not fade. Both are tested.
    """
    fitted, (low, high) = slope(regrets("eta = N^-1/2"))
    assert -0.55 < low < fitted < high < -0.45
    for schedule in ("eta = 1/8", "eta = 8/N"):
        assert slope(regrets(schedule))[1][0] > -0.4
        assert worst(regrets(schedule))[-1] > 4 * worst(regrets("eta = N^-1/2"))[-1]
    dpo = worst(regrets("DPO, eta = 0"))
    assert dpo.min() > 0.25 and slope(regrets("DPO, eta = 0"))[1][0] > -0.1

# ---------------------------------------------------------------------------------------------------------------------
# the numbers and the picture

def print_table():
    print(f"(c) {SETS} data sets a world, beta {BETA}; regret against the best action, mean +- sd over data sets")
    print(f"{'world':<27}{'eta':>7}{'baseline':>10}{'DPO':>16}{'RPO':>16}{'on rare: DPO':>14}{'RPO':>7}{'RPO less':>10}"
          f"{'RPO .1 more':>13}")
    for world in WORLDS:
        for scale in (0.05, 0.5, 5.0) if world == "partial coverage" else (0.5,):
            w = overoptimisation(world, scale)
            dpo, rpo = w["dpo regret"], w["rpo regret"]
            shares = [x.double().mean() for x in (w["dpo thin mass"] > 0.5, w["rpo thin mass"] > 0.5, rpo < dpo,
                                                  rpo > dpo + 0.1)]
            print(f"{world:<27}{w['eta']:>7.4f}{w['baseline regret'].mean():>10.3f}"
                  f"{f'{dpo.mean():.3f} +- {dpo.std():.3f}':>16}{f'{rpo.mean():.3f} +- {rpo.std():.3f}':>16}"
                  f"{shares[0]:>14.1%}{shares[1]:>7.1%}{shares[2]:>10.1%}{shares[3]:>13.1%}")
    print("on rare: share of data sets with more than half of the policy's mass on actions compared at most twice\n")
    print("(d) largest mean regret over the gaps, beta = N^-1/2; slope of its logarithm against log N [95% interval]")
    print(f"{'N':<16}" + "".join(f"{n:>8}" for n in NUMBERS))
    for schedule in SCHEDULES:
        fitted, (low, high) = slope(regrets(schedule))
        print(f"{schedule:<16}" + "".join(f"{y:>8.4f}" for y in worst(regrets(schedule)))
              + f"   {fitted:+.3f} [{low:+.3f}, {high:+.3f}]")
    groups = [slope(regrets("eta = N^-1/2", seed))[0] for seed in range(1, 6)]
    print("eta = N^-1/2 again on five other groups of data sets:", " ".join(f"{g:+.3f}" for g in groups))


def draw(path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    # colours apart for the colour-blind; markers and line styles tell them apart in grey
    black, orange, blue, grey = "black", "#D55E00", "#0072B2", "#999999"
    figure = plt.figure(figsize=(11, 3.9), layout="constrained")
    grid = figure.add_gridspec(2, 3)

    w = overoptimisation("partial coverage")
    example = int((w["dpo thin mass"] > 0.5).nonzero()[0])  # the first data set on which DPO is fooled
    at, top = np.arange(8), 3.0
    rewards = figure.add_subplot(grid[0, 0])
    rewards.plot(at, TRUE[0], "_", color=black, markersize=16, markeredgewidth=2, label="true")
    for name, label, colour, marker, shift in (("dpo", "MLE", orange, "^", -0.15),
                                               ("rpo", "Algorithm 1 = RPO", blue, "o", 0.15)):
        r = w[name + " reward"][example].numpy()
        r = np.clip(r - r[0] + TRUE[0, 0], -top, top)  # known up to a constant: true at the first action
        rewards.plot(at + shift, r, marker, color=colour, markersize=5, label=label, clip_on=False)
    rewards.set(ylabel=f"reward (cut at ±{top:.0f})", ylim=(-top, top), xticks=at, xticklabels=[])
    rewards.set_title("A data set that fools DPO (200 pairs)", fontsize=10)
    rewards.legend(loc="lower left", fontsize=7, ncols=3, columnspacing=0.8, handletextpad=0.4,
                   bbox_to_anchor=(-0.03, -0.32))
    mass = figure.add_subplot(grid[1, 0])
    mass.bar(at - 0.2, w["dpo"][example], 0.4, color=orange, label="DPO")
    mass.bar(at + 0.2, w["rpo"][example], 0.4, color=blue, hatch="///", edgecolor="white", label="Algorithm 1 = RPO")
    mass.set(ylabel="policy mass", ylim=(0, 1.05), xticks=at, xlabel="action: times compared",
             xticklabels=[f"{n:.0f}" for n in w["comparisons"][example]])
    mass.legend(fontsize=7)

    spread = figure.add_subplot(grid[:, 1])
    share = np.arange(1, SETS + 1) / SETS
    for world, style in (("partial coverage", "-"), ("full coverage", "--")):
        for name, label, colour in (("dpo", "DPO", orange), ("rpo", "RPO", blue)):
            w = overoptimisation(world)
            regret = w[name + " regret"]
            spread.plot(np.sort(regret), share, style, color=colour, lw=1.8 if style == "-" else 1.2,
                        label=f"{label}, {world}: mean {regret.mean():.2f}")
    spread.set(xlabel="true regret", ylabel="share of data sets with no more regret", xlim=(-0.03, 2.05),
               ylim=(0, 1.02))
    spread.set_title(f"{SETS} data sets each", fontsize=10)
    spread.legend(fontsize=8, loc="lower right")

    rate = figure.add_subplot(grid[:, 2])
    styles = {"eta = N^-1/2": ("RPO, $\\eta=N^{-1/2}$", blue, "o-"), "eta = 1/8": ("RPO, $\\eta=1/8$", grey, "s--"),
              "eta = 8/N": ("RPO, $\\eta=8/N$", grey, "v:"), "DPO, eta = 0": ("DPO", orange, "^-")}
    for schedule, (label, colour, style) in styles.items():
        rate.loglog(NUMBERS, worst(regrets(schedule)), style, color=colour, markersize=4, label=label)
    fitted, (low, high) = slope(regrets("eta = N^-1/2"))
    y = worst(regrets("eta = N^-1/2"))
    line = np.exp(np.mean(np.log(y)) + fitted * (np.log(NUMBERS) - np.mean(np.log(NUMBERS))))
    rate.loglog(NUMBERS, line, "-", color=black, lw=0.8, label=f"slope {fitted:.2f} [{low:.2f}, {high:.2f}]")
    rate.set(xlabel="pairs N", ylabel="regret, worst instance")
    rate.set_title("One action compared once, at every N", fontsize=10)
    rate.legend(fontsize=8, loc="lower left")

    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path + ".tmp", dpi=110, format="png")
    os.replace(path + ".tmp", path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the theory's numbers, draw its picture.", allow_abbrev=False)
    parser.add_argument("--out", default="assets/theory.png", help="the picture, a PNG file (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_table()
    draw(options.out)
    print(f"wrote {options.out}")
