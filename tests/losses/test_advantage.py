"""Advantages against the papers' formulas: group by group, and sets of k by enumeration."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from tests.losses.case import Case, oracle_tests


def group_by_group(advantages):
    """Groups of fewer than 2 valid samples, or whose rewards are all equal, have no advantage."""

    def oracle(rewards, is_valid, **kwargs):
        lengths = kwargs.pop("lengths", rewards)
        out = np.zeros(rewards.shape)
        for i in range(len(rewards)):
            on = is_valid[i]
            if len(set(rewards[i][on])) >= 2:
                more = (lengths[i][on],) if lengths is not rewards else ()
                out[i][on] = advantages(rewards[i][on], *more, **kwargs)
        return out

    return oracle


def zscores(r, *, ddof=1, eps=1e-4):
    deviations = r - r.mean()
    return deviations / (np.sqrt((deviations**2).sum() / (len(r) - ddof)) + eps)


def minus_others(r):
    return np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])


def minus_weighted(r, lengths):
    return r - sum(n * x for n, x in zip(lengths, r, strict=True)) / sum(lengths)


group_zscore = group_by_group(zscores)
group_center = group_by_group(lambda r: r - r.mean())


def remax(rewards, greedy_rewards, is_valid):
    out = np.zeros(rewards.shape)
    for i, j in zip(*np.nonzero(is_valid), strict=True):
        out[i, j] = rewards[i, j] - greedy_rewards[i]
    return out


def gpg(rewards, is_valid):
    """eq. 7: the mean over all B samples becomes one over the B - M that have a gradient."""
    num_all, num_without = is_valid.sum(), 0
    for group, on in zip(rewards, is_valid, strict=True):
        if len(set(group[on])) < 2:
            num_without += on.sum()
    if num_all == num_without:
        return np.zeros(rewards.shape)
    return group_center(rewards, is_valid) * num_all / (num_all - num_without)


def pass_at_k(is_correct, is_valid, *, k):
    """Every set of k: rewarded if any is right, z-scored over the sets, averaged over its own."""
    out = np.zeros(is_correct.shape)
    for i in range(len(is_correct)):
        members = np.flatnonzero(is_valid[i])
        sets = list(itertools.combinations(members, k))
        rewards = np.array([any(is_correct[i][j] for j in s) for s in sets], float)
        if len(set(rewards)) < 2:
            continue
        scores = (rewards - rewards.mean()) / rewards.std()
        for j in members:
            out[i, j] = np.mean([score for score, s in zip(scores, sets, strict=True) if j in s])
    return out


def gdpo(part_rewards, is_valid, *, weights=None, eps=1e-4):
    total = np.zeros(is_valid.shape)
    for r in range(part_rewards.shape[2]):
        weight = 1 if weights is None else weights[r]
        total += weight * group_zscore(part_rewards[:, :, r], is_valid, eps=eps)
    x = total[is_valid]
    out = np.zeros(is_valid.shape)
    if len(x) >= 2:
        out[is_valid] = (x - x.mean()) / (x.std(ddof=1) + eps)
    return out


def whiten(advantage, mask, *, shift_mean=True, eps=1e-8):
    out, x = np.zeros(mask.shape), advantage[mask]
    if len(x):
        variance = sum((y - x.mean()) ** 2 for y in x) / len(x)
        out[mask] = (x - x.mean()) / np.sqrt(variance + eps) + (0 if shift_mean else x.mean())
    return out


def distillation(policy_logp, teacher_logp, mask):
    out = np.zeros(mask.shape)
    for i in zip(*np.nonzero(mask), strict=True):
        out[i] = -(policy_logp[i] - teacher_logp[i])
    return out


def is_informative(rewards, is_valid):
    kept = [group[valid] for group, valid in zip(rewards, is_valid, strict=True)]
    return np.array([len(set(group.tolist())) > 1 for group in kept])


TestOracles = oracle_tests(
    [
        Case(losses.group_zscore, group_zscore),
        Case(losses.group_zscore, group_zscore, {"ddof": 0, "eps": 0.5}),
        Case(losses.group_center, group_center),
        Case(losses.is_informative, is_informative),
        Case(losses.leave_one_out, group_by_group(minus_others)),
        Case(losses.opo, group_by_group(minus_weighted)),
        Case(losses.remax, remax),
        Case(losses.gpg, gpg),
        *(Case(losses.pass_at_k, pass_at_k, {"k": k}) for k in (1, 2, 3)),
        # Opposite rewards cancel but for eps, 1e-4 of them: float32 keeps three digits of that.
        Case(losses.gdpo, gdpo, rtol=1e-3),
        Case(losses.gdpo, gdpo, {"weights": (2.0, -0.5), "eps": 0.1}),
        Case(losses.global_whiten, whiten),
        Case(losses.global_whiten, whiten, {"shift_mean": False, "eps": 0.1}),
        Case(
            losses.reinforce_pp_baseline,
            lambda rewards, is_valid: whiten(group_center(rewards, is_valid), is_valid),
        ),
        Case(losses.distillation_advantage, distillation),
    ]
)

GROUP = [
    losses.group_zscore,
    losses.group_center,
    losses.leave_one_out,
    losses.gpg,
    losses.reinforce_pp_baseline,
    lambda rewards, is_valid: losses.opo(rewards, jnp.full(rewards.shape, 3), is_valid),
    lambda rewards, is_valid: losses.gdpo(jnp.stack([rewards, -rewards], -1), is_valid),
]


def test_by_hand():
    rewards = jnp.array([[1.0, 0, 0, 1.0], [1.0, 0, 0, 0]])
    valid = jnp.ones((2, 4), bool)
    zscore = losses.group_zscore(rewards, valid)
    std = np.array([[np.sqrt(1 / 3)], [0.5]])  # ddof 1, and eps 1e-4
    expected = np.array([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]])
    np.testing.assert_allclose(zscore, expected / (std + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(losses.group_center(rewards, valid), expected, rtol=1e-6)


def test_leave_one_out_by_hand():
    rewards = jnp.array([[3.0, 1.0, 2.0, 9.0]])
    valid = jnp.array([[True, True, True, False]])
    out = losses.leave_one_out(rewards, valid)
    np.testing.assert_allclose(out, [[3 - 1.5, 1 - 2.5, 2 - 2, 0]], atol=1e-6)


def test_opo_by_hand():
    # The baseline is (1 * 3 + 3 * 1) / 4 = 1.5: the long answer pulls it down from 2.
    rewards, lengths = jnp.array([[3.0, 1.0]]), jnp.array([[1, 3]])
    out = losses.opo(rewards, lengths, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(out, [[1.5, -0.5]])
    # Answers of one length leave the mean.
    same = losses.opo(rewards, jnp.array([[5, 5]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(same, [[1.0, -1.0]])


def test_remax_by_hand():
    rewards, valid = jnp.array([[1.0], [0.25]]), jnp.ones((2, 1), bool)
    np.testing.assert_allclose(
        losses.remax(rewards, jnp.array([0.5, 1.0]), valid), [[0.5], [-0.75]]
    )


def test_remax_reads_no_baseline_of_a_group_without_samples():
    valid = jnp.array([[False, False], [True, False]])
    out = losses.remax(jnp.ones((2, 2)), jnp.array([jnp.nan, 0.5]), valid)
    assert out.tolist() == [[0, 0], [0.5, 0]]


def test_gpg_by_hand():
    # Of 7 samples 3 are in a group that agrees and 1 is alone: alpha = 7 / (7 - 4).
    rewards = jnp.array([[1.0, 0.0, 0.5], [1.0, 1.0, 1.0], [4.0, 0.0, 0.0]])
    valid = jnp.array([[True] * 3, [True] * 3, [True, False, False]])
    expected = [[0.5 * 7 / 3, -0.5 * 7 / 3, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(losses.gpg(rewards, valid), expected, atol=1e-6)
    # Groups of one size: samples and groups give the same alpha, 3 / 2.
    full = losses.gpg(rewards, jnp.ones((3, 3), bool))
    np.testing.assert_allclose(full[0], [0.75, -0.75, 0], atol=1e-6)


def test_pass_at_k_by_hand():
    # n = 4, 3 wrong, k = 2: 1 - Rbar = C(3, 2) / C(4, 2) = 1/2, so sigma = 1/2;
    # right: (1/2) / sigma = 1; wrong: (1/2 - C(2, 1) / C(3, 1)) / sigma = -1/3.
    right = jnp.array([[True, False, False, False]])
    out = losses.pass_at_k(right, jnp.ones((1, 4), bool), k=2)
    np.testing.assert_allclose(out, [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6)


def test_pass_at_1_is_the_zscore_of_the_verdicts():
    right = np.random.default_rng(0).random((20, 6)) < 0.5
    valid = np.random.default_rng(1).random((20, 6)) < 0.8
    out = losses.pass_at_k(jnp.asarray(right), jnp.asarray(valid), k=1)
    expected = group_zscore(right.astype(float), valid, ddof=0, eps=0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_pass_at_k_in_large_groups():
    # C(1024, 512) is about 4e306. Right and wrong sum to 0 whatever the numbers.
    right = jnp.arange(1024)[None] < 2
    out = np.asarray(losses.pass_at_k(right, jnp.ones((1, 1024), bool), k=512), np.float64)
    # Both right ones are in the other half with probability (512/1024) (511/1023).
    all_wrong = (512 * 511) / (1024 * 1023)
    np.testing.assert_allclose(out[0, 0], np.sqrt(all_wrong / (1 - all_wrong)), rtol=1e-4)
    np.testing.assert_allclose(out.sum(), 0, atol=1e-4)


def test_gdpo_by_hand():
    # The first group differs in both rewards, the second in one. Each (1, 0) has the z-scores +-c,
    # c = 0.5 / (sqrt(0.5) + 1e-4), so that A = (2c, -2c), (c, -c); its std is sqrt(10 c^2 / 3).
    parts = jnp.array([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    c = 0.5 / (np.sqrt(0.5) + 1e-4)
    expected = np.array([[2 * c, -2 * c], [c, -c]]) / (np.sqrt(10 * c**2 / 3) + 1e-4)
    out = losses.gdpo(parts, jnp.ones((2, 2), bool))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    # The sum of the rewards has the same z-scores in both groups: that is what GDPO mends.
    np.testing.assert_allclose(*losses.group_zscore(parts.sum(2), jnp.ones((2, 2), bool)), 1e-4)


def test_global_whiten_by_hand():
    x, mask = jnp.array([[1.0, 3.0], [jnp.nan, 5.0]]), jnp.array([[True, True], [False, True]])
    # Mean 3, variance (4 + 0 + 4) / 3.
    scale = 1 / np.sqrt(8 / 3)
    expected = [[-2 * scale, 0], [0, 2 * scale]]
    np.testing.assert_allclose(losses.global_whiten(x, mask), expected, rtol=1e-6)
    kept = losses.global_whiten(x, mask, shift_mean=False)
    np.testing.assert_allclose(kept, [[3 - 2 * scale, 3], [0, 3 + 2 * scale]], rtol=1e-6)


def test_reinforce_pp_baseline_by_hand():
    # Centred +-1 and +-3: variance (1 + 1 + 9 + 9) / 4 = 5 over the batch, not over each group.
    rewards = jnp.array([[2.0, 0.0], [10.0, 4.0]])
    out = losses.reinforce_pp_baseline(rewards, jnp.ones((2, 2), bool))
    np.testing.assert_allclose(out, np.array([[1, -1], [3, -3]]) / np.sqrt(5), rtol=1e-6)


def test_distillation_advantage_by_hand():
    # The teacher finds the first token likelier than the student does, and the second less so.
    logp, teacher_logp = jnp.array([[-2.0, -1.0]]), jnp.array([[-0.5, -4.0]])
    out = losses.distillation_advantage(logp, teacher_logp, jnp.ones((1, 2), bool))
    assert out.tolist() == [[1.5, -3.0]]


def test_is_informative():
    rewards = jnp.array([[1.0, 0.0], [0.1, 0.1], [1.0, jnp.nan], [jnp.inf, 2.0], [3.0, 4.0]])
    valid = jnp.array([[True, True], [True, True], [True, False], [False] * 2, [True, True]])
    assert losses.is_informative(rewards, valid).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("function", GROUP)
def test_no_baseline_no_advantage(function):
    rewards = jnp.array([[7.0, jnp.nan, jnp.inf], [1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [5.0, 5.0, -9]])
    valid = jnp.array([[True, False, False], [False] * 3, [True] * 3, [True, True, False]])
    # A lone sample, none, three equal ones, two equal ones and an invalid one.
    assert (np.asarray(function(rewards, valid)) == 0).all()


@pytest.mark.parametrize("function", [*GROUP, losses.global_whiten])
def test_rounding_of_the_mean_makes_no_advantage(function):
    # Seven times one of these, added and divided in float32, is not the reward.
    for reward in (0.1, 0.3, 0.7, 0.9):
        rewards = jnp.full((4, 7), reward)
        assert (np.asarray(function(rewards, jnp.ones((4, 7), bool))) == 0).all()


def test_group_advantages_sum_to_zero():
    rng = np.random.default_rng(2)
    rewards, valid = jnp.asarray(rng.normal(size=(30, 5))), jnp.asarray(rng.random((30, 5)) < 0.7)
    lengths = jnp.asarray(rng.integers(1, 9, (30, 5)), jnp.int32)
    for function in GROUP[:5]:
        np.testing.assert_allclose(function(rewards, valid).sum(1), 0, atol=1e-5)
    right = losses.pass_at_k(rewards > 0, valid, k=2)
    np.testing.assert_allclose(right.sum(1), 0, atol=1e-5)
    # That of OPO does weighted by length.
    weighted = losses.opo(rewards, lengths, valid) * lengths
    np.testing.assert_allclose(weighted.sum(1), 0, atol=1e-5)


def test_finite_at_extremes():
    logp, teacher_logp = jnp.array([[-1e4, 0.0]]), jnp.array([[0.0, -1e4]])
    on = jnp.ones((1, 2), bool)
    out = losses.distillation_advantage(logp, teacher_logp, on)
    assert out.tolist() == [[1e4, -1e4]]
    for function in (*GROUP, losses.global_whiten):
        assert np.isfinite(function(jnp.array([[1e4, -1e4]]), on)).all()


def test_errors():
    one = jnp.ones((3, 1)), jnp.ones((3, 1), bool)
    for function in (*GROUP, losses.is_informative):
        with pytest.raises(ValueError, match="group_size=1 gives no baseline; use at least 2"):
            function(*one)
        with pytest.raises(AssertionError):
            function(jnp.ones(4), jnp.ones(4, bool))
        with pytest.raises(AssertionError):
            function(jnp.ones((2, 4)), jnp.ones((2, 4)))
    two = jnp.ones((3, 2)), jnp.ones((3, 2), bool)
    with pytest.raises(ValueError, match="ddof=2"):
        losses.group_zscore(*two, ddof=2)
    with pytest.raises(ValueError, match="eps=0"):
        losses.group_zscore(*two, eps=0)
    with pytest.raises(ValueError, match="eps=0"):
        losses.global_whiten(*two, eps=0)
    for k in (0, 2):
        with pytest.raises(ValueError, match=rf"k={k}: expected 1 <= k < group_size=2"):
            losses.pass_at_k(two[1], two[1], k=k)
    with pytest.raises(ValueError, match=r"weights=\(1.0,\): expected one for each of 2 rewards"):
        losses.gdpo(jnp.ones((3, 2, 2)), two[1], weights=(1.0,))
    for broken in (
        functools.partial(losses.opo, two[0], two[0]),
        functools.partial(losses.opo, two[0], jnp.ones((3, 1), jnp.int32)),
        functools.partial(losses.remax, two[0], jnp.ones(2)),
        functools.partial(losses.gdpo, two[0]),
        functools.partial(losses.pass_at_k, two[0], k=1),
    ):
        with pytest.raises(AssertionError):
            broken(two[1])
