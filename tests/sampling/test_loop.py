"""Walks from noise to image: their times, and that an element is the same in any batch."""

from __future__ import annotations

import math
import re
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medseg_diffusion.diffusion.denoiser import GaussianDenoiser, NetworkDenoiser
from medseg_diffusion.diffusion.noise import gaussian, generators
from medseg_diffusion.diffusion.prediction import Prediction
from medseg_diffusion.diffusion.schedule import cosine, linear, sigmoid
from medseg_diffusion.networks.unet import UNet
from medseg_diffusion.sampling.ddim import DDIM
from medseg_diffusion.sampling.loop import sample, spaced, spread
from tests.helpers.diffusion import LINEAR
from tests.helpers.samplers import SAMPLERS, SCHEDULES, SPACINGS, Wave


@settings(deadline=None, max_examples=60)
@given(start=st.integers(1, 1000), share=st.floats(0, 1), make=st.sampled_from([linear, cosine]))
def test_spread_times_are_as_many_as_asked_for(start, share, make) -> None:
    count = max(1, round(share * start))
    times = spread(make(1000), count, start)
    assert len(times) == count and times[0] == start and times[-1] == (1 if count > 1 else start)
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize(("start", "count"), [(1000, 12), (500, 12), (250, 10)])
def test_spread_times_are_the_log_snr_spacing_where_none_coincide(start, count) -> None:
    assert [*spread(LINEAR, count, start), 0] == spaced(LINEAR, count, "log-snr", start)


def test_spread_times_waste_no_step_on_the_clipped_end_of_the_cosine_schedule() -> None:
    assert [*spread(cosine(1000), 10, 1000), 0] == spaced(cosine(1000), 10, "log-snr")


def test_spread_times_fill_the_clean_end_before_they_leave_the_spacing() -> None:
    times = spread(LINEAR, 51, 250)
    assert times[-6:] == [6, 5, 4, 3, 2, 1]
    lam = LINEAR.half_log_snr()[times[:20]]
    even = (lam[-1] - lam[0]) / 19
    torch.testing.assert_close(lam.diff(), even.expand(19), rtol=0.15, atol=0)


# ---- times -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    num_steps=st.integers(21, 1000),
    count=st.integers(1, 60),
    how=st.sampled_from(SPACINGS),
    kind=st.sampled_from([linear, cosine, sigmoid]),
    share=st.floats(0.05, 1),
)
def test_times_decrease_to_the_clean_one(num_steps, count, how, kind, share) -> None:
    schedule, start = kind(num_steps), max(1, round(share * num_steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = spaced(schedule, count, how, start)
    assert times[-1] == 0 and len(times) <= count + 1
    assert all(t > s for t, s in pairwise(times))
    assert times[0] <= start
    if how != "leading":
        assert times[0] == start


def test_the_spacings_by_hand() -> None:
    schedule = linear(100)
    assert spaced(schedule, 4, "trailing") == [100, 75, 50, 25, 0]
    assert spaced(schedule, 4, "leading") == [76, 51, 26, 1, 0]
    assert spaced(schedule, 4, "linspace") == [100, 67, 34, 1, 0]
    assert spaced(schedule, 1) == [100, 0]
    for how in SPACINGS:
        assert spaced(schedule, 100, how) == list(range(100, -1, -1)), "as many calls as times visit every one"
        assert spaced(schedule, 40, how, start=40) == list(range(40, -1, -1))
    assert spaced(schedule, 4, "trailing", start=40) == [40, 30, 20, 10, 0]


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(1, 60),
    how=st.sampled_from(SPACINGS),
    ends=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
)
def test_no_time_between_the_stop_and_zero_is_visited(count, how, ends) -> None:
    stop, start = sorted(ends)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        times = spaced(linear(1000), count, how, start, stop)
    assert times[-1] == 0 and stop <= times[-2] <= times[0] <= start
    assert all(t > s for t, s in pairwise(times))
    if how in ("log-snr", "linspace") and count > 1:
        assert times[-2] == stop and times[0] == start


def test_log_snr_times_are_even_in_log_snr() -> None:
    schedule = linear(1000)
    times = spaced(schedule, 8)
    gaps = schedule.half_log_snr()[times[:-1]].diff()
    even = (schedule.half_log_snr()[1] - schedule.half_log_snr()[1000]) / 7
    torch.testing.assert_close(gaps, even.expand(7), rtol=0.15, atol=0)


@pytest.mark.parametrize(("how", "count"), [("log-snr", 45), ("trailing", 60), ("linspace", 60), ("leading", 60)])
def test_times_that_coincide_are_removed_with_a_warning_that_counts_them(how, count) -> None:
    with pytest.warns(UserWarning, match=rf"{count} steps asked for, but only \d+ distinct") as caught:
        times = spaced(linear(50), count, how)
    [warning] = caught
    assert f"only {len(times) - 1} distinct" in str(warning.message)
    assert len(set(times)) == len(times)


@pytest.mark.parametrize(
    ("count", "start", "message"), [(0, None, "at least one step"), (5, 0, "in 1..100"), (5, 101, "in 1..100")]
)
def test_impossible_times_are_refused(count, start, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spaced(linear(100), count, "trailing", start)


@pytest.mark.parametrize("stop", [0, 51])
def test_an_impossible_stop_is_refused(stop) -> None:
    with pytest.raises(ValueError, match=re.escape("the stop must lie in 1..50")):
        spaced(linear(100), 5, start=50, stop=stop)


# ---- the walk --------------------------------------------------------------------------------------------------------


def test_the_last_step_returns_the_predicted_image() -> None:
    """At t = 0 there is no noise left to extrapolate through: every sampler returns x0, without noise."""
    schedule = SCHEDULES["linear"]
    for name, sampler in SAMPLERS.items():
        seen: list[tuple[int, Tensor, Prediction]] = []
        x = gaussian((1, 6, 6), generators([0, 1]))
        out = sample(
            NetworkDenoiser(Wave(), schedule, "v"),
            sampler,
            x,
            [900, 400, 40, 0],
            generators=generators([2, 3]),
            on_step=lambda *step: seen.append(step),  # noqa: B023
        )
        assert [s for s, _, _ in seen] == [400, 40, 0], name
        torch.testing.assert_close(out, seen[-1][2].x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out, seen[-1][1], rtol=0, atol=0)
        assert not torch.equal(seen[0][1], seen[0][2].x0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spatial", [(9, 7), (5, 4, 3)], ids=["2D", "3D"])
def test_an_element_is_the_same_in_any_batch(name, spatial) -> None:
    schedule = SCHEDULES["cosine"]

    def run(seeds: list[int]) -> Tensor:
        own = generators(seeds)
        x = gaussian((2, *spatial), own)
        return sample(GaussianDenoiser(schedule, 0.1, 0.5), SAMPLERS[name], x, spaced(schedule, 6), generators=own)

    together = run([11, 12, 13, 14])
    assert torch.equal(together[2:3], run([13]))
    assert torch.equal(together[[3, 0]], run([14, 11]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_gives_an_element_the_same_result_in_any_batch(name) -> None:
    """Kernels may sum in another order for another batch; the noise may not differ at all."""
    torch.manual_seed(0)
    network = UNet(2, 1, 1, channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_factors=(2,))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    denoiser = NetworkDenoiser(network.eval(), SCHEDULES["cosine"], "v")

    def run(seeds: list[int]) -> Tensor:
        own = generators(seeds)
        x = gaussian((1, 16, 16), own)
        return sample(denoiser, SAMPLERS[name], x, spaced(SCHEDULES["cosine"], 8), generators=own)

    together = run([11, 12, 13, 14, 15])
    torch.testing.assert_close(run([13]), together[2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(run([15, 11]), together[[4, 0]], rtol=0, atol=1e-4)


def test_half_precision_leaves_the_schedule_alone() -> None:
    """A table rounded to bfloat16 has alpha_bar = 1 for many times: sigma is then 0 and eps infinite."""
    schedule = linear(1000)
    before = schedule.alpha_bar.clone()
    network = UNet(2, 1, 1, channels=32, channel_mult=(1,), num_res_blocks=1)
    denoiser = NetworkDenoiser(network, schedule, "v").to(torch.bfloat16)
    own = generators([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        for sampler in SAMPLERS.values():
            out = sample(denoiser, sampler, gaussian((1, 8, 8), own), [1000, 500, 2, 1, 0], generators=own)
            assert out.dtype == torch.float32 and out.isfinite().all()
    assert next(network.parameters()).dtype == torch.bfloat16
    assert denoiser.schedule.alpha_bar.dtype == torch.float64
    assert torch.equal(denoiser.schedule.alpha_bar, before)
    alpha, sigma = denoiser.schedule.scales(1, torch.zeros(1, 1, 8, 8, dtype=torch.float32))
    torch.testing.assert_close((alpha**2 + sigma**2).flatten(), torch.ones(1), rtol=0, atol=1e-6)
    assert float(sigma) == pytest.approx(math.sqrt(1e-4), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_walk_keeps_the_type_of_its_start(dtype) -> None:
    for name, sampler in SAMPLERS.items():
        own = generators([0])
        x = torch.zeros(1, 1, 4, 4, dtype=dtype)
        out = sample(GaussianDenoiser(SCHEDULES["linear"]), sampler, x, [500, 100, 0], generators=own)
        assert out.dtype == dtype, name


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", ["ddpm", "ddpm-beta", "ddim-0.5"])
def test_a_stochastic_sampler_needs_a_generator_for_every_element(name, count) -> None:
    denoiser, x, own = GaussianDenoiser(SCHEDULES["linear"]), torch.zeros(2, 1, 3, 3), generators(range(count))
    with pytest.raises(ValueError, match=f"2 generators are needed, got {count}"):
        sample(denoiser, SAMPLERS[name], x, [500, 100, 0], generators=own)


@pytest.mark.parametrize("times", [[], [500], [500, 500, 0], [500, 600, 0], [0, 5, 3]])
def test_times_that_go_to_and_fro_are_refused(times) -> None:
    with pytest.raises(ValueError, match="strictly monotone and at least two"):
        sample(GaussianDenoiser(SCHEDULES["linear"]), DDIM(), torch.zeros(1, 1, 2, 2), times)


def test_the_condition_reaches_every_call_unchanged() -> None:
    calls: list[object] = []

    class Recorder(Wave):
        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            calls.append(cond)
            return super().forward(x, timesteps)

    cond = {"concat": torch.ones(1, 1, 2, 2)}
    sample(NetworkDenoiser(Recorder(), SCHEDULES["linear"], "x0"), DDIM(), torch.zeros(1, 1, 2, 2), [9, 5, 0], cond)
    assert len(calls) == 2 and all(call is cond for call in calls)


def test_no_gradients_are_kept_while_sampling() -> None:
    network = nn.Conv2d(1, 1, 1)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, timesteps: Tensor, cond: object = None) -> Tensor:
            return self.network(x)

    denoiser = NetworkDenoiser(Wrapped(), SCHEDULES["linear"], "x0")
    assert not sample(denoiser, DDIM(), torch.zeros(1, 1, 2, 2), [9, 5, 0]).requires_grad


def test_log_snr_wastes_no_steps_in_pure_noise() -> None:
    """The clipped last betas of the cosine schedule stretch lambda to -10; no more than the first step lies there."""
    schedule = SCHEDULES["cosine"]
    times = spaced(schedule, 10)
    assert times[0] == schedule.num_steps
    below = [t for t in times[:-1] if float(schedule.half_log_snr()[t]) < -5.2]
    assert below == [schedule.num_steps]
