"""Calibration of ensembles: temperatures, agreement and intervals of volumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_diffusion.methods.calibration import Calibration, TemperatureFit, fit_temperature, not_exceeded
from medseg_diffusion.methods.ensemble import temperature_scaled
from tests.helpers.ensembles import member, normal


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_overconfident_probabilities_is_found(temperature) -> None:
    """Labels drawn from p; the model says p^T: the fit must return T."""
    p = (1.5 * normal(0, 3, 40_000)).softmax(0)
    labels = torch.multinomial(p.T, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    claimed = temperature_scaled(p, 1 / temperature)
    assert fit_temperature((claimed.numpy(), labels.numpy())) == pytest.approx(temperature, rel=0.05)


def test_honest_borders_do_not_make_empty_background_uncertain() -> None:
    """Borders alone would ask for a temperature of 3; far background is certain, right, and stays so."""
    border = (1.5 * normal(0, 2, 20_000)).softmax(0)
    labels = torch.multinomial(border.T, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    claimed = temperature_scaled(border, 1 / 3)
    certain = torch.tensor([[1 - 1e-4], [1e-4]]).expand(2, 20_000).contiguous()
    near, far = (claimed.numpy(), labels.numpy()), (certain.numpy(), np.zeros(20_000, np.int64))
    found = fit_temperature(near, far)
    assert 1 < found < 3
    assert float(temperature_scaled(certain, found)[1, 0]) < 0.03 < float(temperature_scaled(certain, 3)[1, 0])
    assert fit_temperature(near, (np.zeros((2, 0), np.float32), np.zeros(0, np.int64))) == pytest.approx(3, rel=0.05)
    assert fit_temperature() == 1


def test_a_calibration_has_a_temperature_for_every_number_of_members_and_a_bound_of_agreement() -> None:
    fit = TemperatureFit("dpm++", 5)
    generator = torch.Generator().manual_seed(0)
    cases = 6
    for case in range(cases):
        labels = torch.zeros(16, 16, dtype=torch.int64)
        labels[4:12, 4:12] = 1
        # Certain members that are wrong in 10 % of voxels: overconfident alone, less so together.
        wrong = torch.rand(5, 16, 16, generator=generator) < 0.1 + 0.02 * case
        members = torch.stack([member(torch.where(w, 1 - labels, labels), certainty=0.999) for w in wrong])
        fit.add(members, labels)
    found = fit.result()
    assert (found.sampler, found.steps, found.cases, len(found.temperatures)) == ("dpm++", 5, cases, 5)
    assert found.temperature(1) > 1.5 > found.temperature(5) > 0
    assert found.temperature(50) == found.temperature(5)
    assert found.ece[1] < found.ece[0]
    assert found.agreement is not None and 0.5 < found.agreement < 0.8
    alone = TemperatureFit("ddim", 1)
    alone.add(member(labels)[None], labels)
    only = alone.result()
    assert only.agreement is None and None not in only.ece
    assert only.volume_errors == [0.0] and only.level == 0.5
    assert found.level == pytest.approx(cases / (cases + 1), abs=1e-4) and 0 < found.volume_errors[0] < 1


def test_cases_without_a_reference_have_no_calibration_error_near_one() -> None:
    fit = TemperatureFit("dpm++", 1)
    empty = torch.zeros(16, 16, dtype=torch.int64)
    fit.add(member(empty)[None], empty)
    assert fit.result().ece == [None, None]


@pytest.mark.parametrize(("cases", "promised"), [(20, 0.95), (10, 10 / 11), (39, 0.95), (1, 0.5)])
def test_intervals_hold_a_further_case_as_often_as_promised(cases: int, promised: float) -> None:
    """Whatever the distribution of errors: here one with a heavy tail."""
    rng = np.random.default_rng(0)
    trials = 4000
    held = 0
    for _ in range(trials):
        errors = rng.standard_cauchy((cases + 1, 1)) ** 2
        bound, level = not_exceeded(errors[:-1], 0.95)
        assert level == pytest.approx(promised)
        held += bool(errors[-1] <= bound)
    expected = min(cases, int(np.ceil(0.95 * (cases + 1)))) / (cases + 1)
    assert held / trials == pytest.approx(expected, abs=0.02) and held / trials > promised - 0.015


def test_the_interval_of_a_volume_is_symmetric_in_the_logarithm() -> None:
    known = Calibration("dpm++", 1, [1.0], [0.1, 0.1], None, 20, [np.log(2.0), 0.0], 0.95)
    assert known.volume_interval(1, 7.0, 1.0) == pytest.approx((3.0, 15.0))
    assert known.volume_interval(2, 7.0, 1.0) == pytest.approx((7.0, 7.0))
    assert known.volume_interval(1, 0.0, 1.0) == pytest.approx((0.0, 1.0))  # nothing found: at most a position
