"""What a network predicts, and how image and noise are read from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_diffusion.diffusion.prediction import Target, read_output, target_of
from tests.helpers.diffusion import FLOW, SCHEDULES, TARGETS, normal


# The table of cosine has alpha = 5e-5 at its very end, where eps is an ill-conditioned target: stay clear of it.
@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(sorted(SCHEDULES)), t=st.integers(1, 980), target=st.sampled_from(TARGETS))
def test_read_out_inverts_the_target_at_any_time(name, t, target) -> None:
    schedule = SCHEDULES[name]
    x0, eps = normal(1, 2, 3, 4, 5), normal(2, 2, 3, 4, 5)
    x_t = schedule.add_noise(x0, eps, t)
    alpha, sigma = schedule.scales(t, x_t)
    found_x0, found_eps = read_output(target, target_of(target, x0, eps, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(t=st.integers(1, 980), target=st.sampled_from(TARGETS))
def test_both_read_outs_of_any_output_describe_the_same_point(t, target) -> None:
    schedule = SCHEDULES["linear"]
    x_t, out = normal(3, 1, 2, 6, 6), normal(4, 1, 2, 6, 6)
    alpha, sigma = schedule.scales(t, x_t)
    x0, eps = read_output(target, out, x_t, alpha, sigma)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target_of(target, x0, eps, alpha, sigma), out, rtol=1e-9, atol=1e-9)


def test_v_is_the_published_combination() -> None:
    schedule = SCHEDULES["linear"]
    x0, eps = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = schedule.scales(300, x0)
    torch.testing.assert_close(target_of("v", x0, eps, alpha, sigma), -sigma)
    torch.testing.assert_close(target_of("v", eps, x0, alpha, sigma), alpha)


def test_the_flow_is_the_velocity_of_the_straight_path() -> None:
    """dz/du of z = x_t / (alpha + sigma) along u = sigma / (alpha + sigma), by differences: on any schedule."""
    x0, eps = normal(5, 1, 1, 3, 3), normal(6, 1, 1, 3, 3)
    for schedule in SCHEDULES.values():
        points = []
        for t in (400, 401):
            alpha, sigma = schedule.scales(t, x0)
            points.append((schedule.add_noise(x0, eps, t) / (alpha + sigma), sigma / (alpha + sigma)))
        (z, u), (z_later, u_later) = points
        slope = (z_later - z) / (u_later - u)
        torch.testing.assert_close(slope, target_of("flow", x0, eps, *schedule.scales(400, x0)), rtol=0, atol=1e-8)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    t=st.integers(1, 980),
    targets=st.lists(st.sampled_from(TARGETS), min_size=2, max_size=6),
)
def test_any_chain_of_conversions_ends_where_it_began(name, t, targets) -> None:
    x_t, out = normal(7, 1, 2, 4, 4), normal(8, 1, 2, 4, 4)
    alpha, sigma = SCHEDULES[name].scales(t, x_t)
    value = out
    for now, then in zip(targets, [*targets[1:], targets[0]], strict=True):
        value = target_of(then, *read_output(now, value, x_t, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(value, out, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(t=st.integers(981, 1000), start=st.sampled_from(["x0", "v", "flow"]), other=st.sampled_from(["x0", "v", "flow"]))
def test_conversions_without_eps_hold_up_to_pure_noise(t: int, start: Target, other: Target) -> None:
    x_t, out = normal(9, 1, 2, 4, 4), normal(10, 1, 2, 4, 4)
    alpha, sigma = FLOW.scales(t, x_t)
    there = target_of(other, *read_output(start, out, x_t, alpha, sigma), alpha, sigma)
    back = target_of(start, *read_output(other, there, x_t, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(back, out, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(SCHEDULES)), t=st.integers(1, 980))
def test_the_preconditioning_of_edm_is_v(name, t) -> None:
    """Karras et al. 2022, table 1, for data of variance 1: F = -v, its input x_t, and 1 / c_out^2 weighs v by 1."""
    x0, eps = normal(11, 1, 1, 4, 4), normal(12, 1, 1, 4, 4)
    alpha, sigma = SCHEDULES[name].scales(t, x0)
    level = sigma / alpha  # of the noise on unscaled data
    seen = x0 + level * eps
    c_skip, c_out, c_in = 1 / (level**2 + 1), level / (level**2 + 1).sqrt(), 1 / (level**2 + 1).sqrt()
    x_t = SCHEDULES[name].add_noise(x0, eps, t)
    torch.testing.assert_close(c_in * seen, x_t, rtol=1e-9, atol=1e-9)
    out = normal(13, 1, 1, 4, 4)
    denoised = c_skip * seen + c_out * out
    torch.testing.assert_close(denoised, read_output("v", -out, x_t, alpha, sigma)[0], rtol=1e-9, atol=1e-9)
    error = target_of("v", x0, eps, alpha, sigma) + out
    torch.testing.assert_close((denoised - x0) / c_out, error, rtol=1e-6, atol=1e-6)
