"""
Hop 5, rpo_loss: from log-probs to losses and metrics. The yardsticks are the paper's formulas in
numpy, finite differences, and values worked by hand.
"""
import math

import numpy as np
import pytest
import torch

import rpo

FORMS = ("sum", "mean")

def loss_by_numpy(policy, ref, lengths, beta, eta, sft, baseline=None):
    """The two terms of each pair's loss, written apart from rpo.py, in float64."""
    policy, ref = np.asarray(policy, np.float64), np.asarray(ref, np.float64)
    h = (policy[:, 0] - ref[:, 0]) - (policy[:, 1] - ref[:, 1])
    imitated = policy[:, 0] if baseline is None else np.asarray(baseline, np.float64)
    weight = eta * beta if sft == "sum" else eta / np.asarray(lengths, np.float64)
    return np.logaddexp(0, -beta * h), -weight * imitated

def random_logps(seed=0, n=7):
    """Log-probs of policy (n, 2), reference (n, 2) and baseline (n,), float64; lengths (n,)."""
    draw = torch.Generator().manual_seed(seed)

    def logps(*shape):
        return -40 * torch.rand(shape, generator=draw, dtype=torch.float64)

    return logps(n, 2), logps(n, 2), torch.randint(1, 30, (n,), generator=draw), logps(n)

def ones(n, value):
    return torch.full((n,), value, dtype=torch.float64)

# ------------------------------------------------------------------------------------------------
# values

@pytest.mark.parametrize("sft", FORMS)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_losses_are_the_papers(sft, with_baseline):
    """Both forms against the formulas in numpy: the sum and each of its terms."""
    policy, ref, lengths, baseline = random_logps()
    baseline = baseline if with_baseline else None
    losses, metrics = rpo.rpo_loss(
        policy, ref, lengths, beta=0.3, eta=0.7, sft=sft, baseline_logps=baseline)
    dpo, nll = loss_by_numpy(policy, ref, lengths, 0.3, 0.7, sft, baseline)
    assert losses.shape == (7,)
    np.testing.assert_allclose(losses, dpo + nll, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss/dpo"], dpo, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss/sft"], nll, rtol=1e-13)

@pytest.mark.parametrize("sft, loss_sft", [("sum", 1.0), ("mean", 0.5)])
def test_one_pair_by_hand(sft, loss_sft):
    """
    log pi = -10 (chosen), -12 (rejected); log ref = -11, -11; 4 chosen tokens; beta 0.5, eta 0.2.
    h = (-10 + 11) - (-12 + 11) = 2, beta h = 1, -log sigmoid(1) = log(1 + 1/e) = 0.3132617.
    sum: 0.2 * 0.5 * 10 = 1, mean: 0.2 * 10 / 4 = 0.5.
    """
    policy, ref = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.0]])
    losses, metrics = rpo.rpo_loss(policy, ref, torch.tensor([4]), beta=0.5, eta=0.2, sft=sft)
    expected = {
        "loss": 0.3132617 + loss_sft,
        "loss/dpo": 0.3132617,
        "loss/sft": loss_sft,
        "rewards/chosen": 0.5,
        "rewards/rejected": -0.5,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
        "logps/chosen": -10.0,
        "logps/rejected": -12.0,
        "logps/chosen_vs_ref": 1.0,
        "logps/rejected_vs_ref": -1.0,
        "nll_per_token": 2.5,
    }
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(expected, abs=1e-6)
    assert losses.item() == pytest.approx(expected["loss"], abs=1e-6)

def test_the_metric_loss_is_the_loss():
    """What is logged as loss is what is descended."""
    policy, ref, lengths, _ = random_logps(1)
    losses, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.3, eta=0.7)
    assert torch.equal(metrics["loss"], losses)

def test_nll_per_token_is_of_the_imitated_response():
    """It shows what SFT does, so it follows SFT to the baseline."""
    policy, ref, lengths, baseline = random_logps(2)
    _, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.3, eta=0.7)
    torch.testing.assert_close(metrics["nll_per_token"], -policy[:, 0] / lengths)
    _, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.3, eta=0.7, baseline_logps=baseline)
    torch.testing.assert_close(metrics["nll_per_token"], -baseline / lengths)

@pytest.mark.parametrize("sft, factor", [("sum", 2), ("mean", 1)])
def test_beta_weighs_the_sft_term_of_the_sum_alone(sft, factor):
    """In Algorithm 2 eta stands inside the bracket that beta multiplies; not so when averaged."""
    policy, ref, lengths, _ = random_logps(3)
    _, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=0.5, sft=sft)
    _, doubled = rpo.rpo_loss(policy, ref, lengths, beta=0.2, eta=0.5, sft=sft)
    torch.testing.assert_close(doubled["loss/sft"], factor * metrics["loss/sft"])

@pytest.mark.parametrize("sft, factor", [("sum", 1), ("mean", 0.5)])
def test_the_length_divides_the_sft_term_of_the_mean_alone(sft, factor):
    policy, ref, lengths, _ = random_logps(3)
    _, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=0.5, sft=sft)
    _, longer = rpo.rpo_loss(policy, ref, 2 * lengths, beta=0.1, eta=0.5, sft=sft)
    torch.testing.assert_close(longer["loss/sft"], factor * metrics["loss/sft"])

def test_beta_zero_is_sft():
    """The preference part is then the constant log 2, so the averaged form is SFT alone."""
    policy, ref, lengths, _ = random_logps(4)
    losses, _ = rpo.rpo_loss(policy, ref, lengths, beta=0, eta=1, sft="mean")
    torch.testing.assert_close(losses, math.log(2) - policy[:, 0] / lengths, rtol=1e-12, atol=0)

def test_a_tie_counts_half():
    """An untouched policy, all ties, shows an accuracy of 0.5 and no success or failure."""
    policy = torch.tensor([[-5.0, -5.0], [-4.0, -5.0], [-5.0, -4.0]])
    ref = torch.full((3, 2), -5.0)
    losses, metrics = rpo.rpo_loss(policy, ref, torch.ones(3), beta=1.0, eta=0.0)
    assert metrics["rewards/accuracies"].tolist() == [0.5, 1, 0]
    assert losses[0].item() == pytest.approx(math.log(2))

def test_a_huge_margin_gives_a_number():
    """-log sigmoid(-10,000) is 10,000, not the infinity of log(exp(10,000))."""
    policy = torch.tensor([[-1e4, 0.0]])
    losses, _ = rpo.rpo_loss(policy, torch.zeros(1, 2), torch.ones(1), beta=1.0, eta=0.0)
    assert losses.item() == pytest.approx(1e4)

# ------------------------------------------------------------------------------------------------
# gradients

@pytest.mark.parametrize("sft", FORMS)
def test_gradients_by_the_formula(sft):
    """
    d loss / d log pi is -beta sigmoid(-beta h) - the SFT weight on the chosen side and
    beta sigmoid(-beta h) on the rejected one.
    """
    policy, ref, lengths, _ = random_logps(5)
    policy.requires_grad_()
    losses, _ = rpo.rpo_loss(policy, ref, lengths, beta=0.3, eta=0.7, sft=sft)
    losses.sum().backward()
    ratios = policy.detach() - ref
    push = 0.3 * torch.sigmoid(-0.3 * (ratios[:, 0] - ratios[:, 1]))
    weight = ones(7, 0.7 * 0.3) if sft == "sum" else 0.7 / lengths.double()
    expected = torch.stack([-push - weight, push], 1)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-12, atol=0)

@pytest.mark.parametrize("sft", FORMS)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_gradients_by_finite_differences(sft, with_baseline):
    """Of all log-probs that a policy gives."""
    policy, ref, lengths, baseline = random_logps(6)

    def losses(policy, baseline=None):
        return rpo.rpo_loss(
            policy, ref, lengths, beta=0.2, eta=0.7, sft=sft, baseline_logps=baseline)[0]

    inputs = (policy, baseline) if with_baseline else (policy,)
    assert torch.autograd.gradcheck(losses, [logps.requires_grad_() for logps in inputs])

@pytest.mark.parametrize("sft", FORMS)
def test_eta_zero_is_dpo(sft):
    """Without the SFT term nothing but DPO is left, in value and in gradient."""
    policy, ref, lengths, _ = random_logps(7)
    policy.requires_grad_()
    losses, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=0, sft=sft)
    losses.sum().backward()
    assert not metrics["loss/sft"].any()
    assert torch.equal(losses.detach(), metrics["loss/dpo"])
    ratios = policy.detach() - ref
    push = 0.1 * torch.sigmoid(-0.1 * (ratios[:, 0] - ratios[:, 1]))
    torch.testing.assert_close(policy.grad, torch.stack([-push, push], 1), rtol=1e-12, atol=0)

def test_a_baseline_takes_the_sft_term_alone():
    """SFT moves to the baseline; the preference part stays on the pair."""
    policy, ref, lengths, baseline = random_logps(8)
    policy.requires_grad_()
    baseline.requires_grad_()
    losses, _ = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=3, baseline_logps=baseline)
    losses.sum().backward()
    torch.testing.assert_close(baseline.grad, ones(7, -3 * 0.1), rtol=1e-12, atol=0)
    # DPO pushes both sides by the same amount: nothing else pulls at the chosen one
    torch.testing.assert_close(policy.grad.sum(1), ones(7, 0.0))

def test_metrics_do_not_keep_the_graph():
    """A step's metrics are summed and kept; its activations must not be kept with them."""
    policy, ref, lengths, _ = random_logps(9)
    losses, metrics = rpo.rpo_loss(policy.requires_grad_(), ref, lengths, beta=0.1, eta=1)
    assert losses.requires_grad
    assert not any(value.requires_grad for value in metrics.values())
