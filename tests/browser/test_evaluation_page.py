"""The page of `evaluate` in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medseg_diffusion.workflows.evaluate import evaluate
from tests.helpers.browser import PHONE, Visits, overflow
from tests.helpers.masks import box, save


def test_a_page_with_calibration_fits_a_phone(visit: Visits, tmp_path: Path) -> None:
    """The diagram was as wide as its narrowest drawing, and the page with it."""
    save(tmp_path / "pred" / "a_seg.nii.gz", box(4))
    save(tmp_path / "ref" / "a.nii.gz", box(6))
    p = np.where(box(4) == 1, 0.9, 0.1).astype(np.float32)
    save(tmp_path / "pred" / "a_prob.nii.gz", np.stack([1 - p, p], axis=-1))
    assert evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out").reliability is not None
    page = visit(tmp_path / "out" / "report.html", PHONE)
    assert page.get_by_role("heading", name="Calibration").is_visible() and overflow(page) == 0
