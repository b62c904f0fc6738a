"""The viewer of scans in a browser: it draws, it follows the reader, and it never mirrors a patient."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.spatial.transform import Rotation

from medseg_diffusion.reports.theme import CLASSES, PREDICTION, REFERENCE
from medseg_diffusion.reports.viewer import Layer, LayerKind, ViewedCase, viewer
from tests.helpers.browser import DESKTOP, PHONE, Visits, overflow

SMALL = (820, 760)  # without a graphics card, drawing takes long
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
BASE = (files("medseg_diffusion.reports") / "templates" / "base.html.j2").read_text("utf-8")
POLICY = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', BASE)
ORIGIN = np.array([[-2.0, 0, 0, 20], [0, 2, 0, -30], [0, 0, 2, -10], [0, 0, 0, 1]])  # LAS, 2 mm


def case(name: str = "case", kinds: Sequence[LayerKind] = ("prediction",), **changes: Any) -> ViewedCase:
    """A grey head of 2 mm voxels, LAS, whose bright block is right, anterior and superior, and exactly labelled."""
    scan, labels = np.full((24, 28, 20), 40.0), np.zeros((24, 28, 20), np.uint8)
    scan[0] = 0.0
    block = (slice(3, 9), slice(18, 25), slice(12, 17))  # low I is right in LAS
    scan[block], labels[block] = 200.0, 1
    heat = np.zeros(scan.shape)
    heat[12:20, 5:12, 4:10] = 1.0
    images = {"prediction": labels, "reference": np.roll(labels, 2, axis=1), "uncertainty": heat, "anomaly": heat}
    layers = [Layer("scan", scan)]
    layers += [
        Layer(kind, images[kind], labels={1: "block"} if kind in ("prediction", "reference") else {}) for kind in kinds
    ]  # type: ignore[arg-type,index]
    return ViewedCase(**{"name": name, "reason": "worst case", "affine": ORIGIN, "layers": layers, **changes})


def document(*cases: ViewedCase) -> str:
    assert POLICY is not None
    shown = viewer(cases)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{POLICY[0]}'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Scans</title></head>'
        f"<body>{shown.html}{shown.script}</body></html>"
    )


def opened(visit: Visits, page: str, size: tuple[int, int] = SMALL, **options: Any) -> Any:
    tab = visit(page, size, **options)
    tab.wait_for_selector(".viewer[data-ready]", timeout=60_000)
    return tab


def stage(tab: Any) -> np.ndarray:
    """The pixels of the scans, once they have stopped changing: (H, W, 3) in [0, 1]."""
    before = b""
    for _ in range(40):
        tab.wait_for_timeout(60)
        now = tab.locator(".viewer-stage").screenshot()
        if now == before:
            break
        before = now
    return np.asarray(Image.open(io.BytesIO(before)).convert("RGB")) / 255.0


def near(picture: np.ndarray, colour: str | tuple[float, ...], tolerance: float = 0.1) -> np.ndarray:
    return np.all(np.abs(picture - to_rgb(colour)) < tolerance, axis=-1)


def extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Top, bottom, left and right of a mask, without the outermost hundredth."""
    rows, columns = np.nonzero(mask)
    assert rows.size > 20
    return (*np.percentile(rows, [1, 99]), *np.percentile(columns, [1, 99]))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures differ by no more than the last digits of a position do."""
    return bool((np.abs(one - other).max(axis=-1) > 0.15).mean() < 1e-3)


def press(tab: Any, *keys: str) -> None:
    tab.locator(".viewer-canvas").focus()
    for key in keys:
        tab.keyboard.press(key)


def test_it_draws_and_the_keys_and_the_wheel_move_the_slices(visit: Visits) -> None:
    tab = opened(visit, document(case()))
    first = stage(tab)
    assert np.ptp(first) > 0.5
    place = tab.locator(".viewer-place").inner_text()
    assert "Prediction: block" in place
    press(tab, *["PageDown"] * 8)
    lower = stage(tab)
    assert not same(lower, first) and "Prediction: background" in tab.locator(".viewer-place").inner_text()
    press(tab, *["PageUp"] * 8)
    assert same(stage(tab), first) and tab.locator(".viewer-place").inner_text() == place
    for key, back in (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown")):
        press(tab, *[key] * 5)
        assert tab.locator(".viewer-place").inner_text() != place
        press(tab, *[back] * 5)
        assert tab.locator(".viewer-place").inner_text() == place
    box = tab.locator(".viewer-canvas").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.5)
    tab.mouse.wheel(0, 240)
    assert not same(stage(tab), first) and tab.locator(".viewer-place").inner_text() != place
    tab.locator(".viewer-reset").click()
    assert same(stage(tab), first) and tab.locator(".viewer-place").inner_text() == place


def test_letters_of_the_viewers_library_do_nothing(visit: Visits) -> None:
    """NiiVue opens a dialog for ?, cuts the scan for c, and changes the planes for v."""
    tab = opened(visit, document(case()))
    before = stage(tab)
    press(tab, "?", "c", "v", "h", "m")
    assert same(stage(tab), before)


@pytest.mark.parametrize("radiological", [True, False])
def test_the_patient_is_not_mirrored(visit: Visits, radiological: bool) -> None:
    """The block is right, anterior and superior. The marks, the scan and the outline have to agree on that."""
    tab = opened(visit, document(case()))
    if not radiological:
        tab.get_by_role("button", name="Neurological").click()
    for plane, number in (("Axial", 0), ("Coronal", 1), ("Sagittal", 2)):
        tab.get_by_role("button", name=plane).click()
        picture = stage(tab)
        middle = picture.shape[1] / 2
        # White up to the tint of the fill; away from the marks in the corners.
        bright = picture.min(axis=-1) > 0.75
        bright[:40] = False
        top, bottom, left, right = extent(bright)
        on_the_left = (left + right) / 2 < middle
        assert on_the_left == (radiological or number == 2)  # in sagittal slices anterior is always on the left
        assert (top + bottom) / 2 < picture.shape[0] / 2
        outlined = extent(near(picture, CLASSES[0], 0.06))
        assert np.abs(np.subtract(outlined, (top, bottom, left, right))).max() < 0.04 * picture.shape[0]
        tab.get_by_role("button", name="Three planes").click()


def test_scans_far_from_the_patients_axes_are_drawn_as_they_are_marked(visit: Visits) -> None:
    """NiiVue and nibabel choose other axes for such a scan (52 degrees): the lines would lie beside the anatomy."""
    turn = Rotation.from_rotvec(np.deg2rad(52) * np.array([0.16, -0.82, 0.55])).as_matrix()
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[:3, :3] = turn @ affine[:3, :3]
    tab = opened(visit, document(case(affine=affine)))
    tab.get_by_role("button", name="Axial").click()
    picture = stage(tab)
    bright = picture.min(axis=-1) > 0.75
    bright[:40] = False
    assert np.abs(np.subtract(extent(near(picture, CLASSES[0], 0.06)), extent(bright))).max() < 0.04 * len(picture)
    # The block is around (5.5, 21, 14) in the file; the cross stands within it.
    said = tab.locator(".viewer-place").inner_text()
    place = [float(number) * (-1 if side in "LPI" else 1) for side, number in re.findall(r"([LRPAIS]) ([\d.]+)", said)]
    inside = np.linalg.inv(affine) @ [*place, 1.0]
    assert (inside[:3] > [2.9, 17.9, 11.9]).all() and (inside[:3] < [8.1, 24.1, 16.1]).all()


def test_the_marks_name_the_sides(visit: Visits) -> None:
    """What is written on the canvas cannot be read from its pixels: the calls that write it are recorded."""
    page = document(case()).replace(
        "<body>",
        "<body><script>const fill = CanvasRenderingContext2D.prototype.fillText; window.marks = [];"
        "CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {"
        " window.marks.push([text, x]); return fill.call(this, text, x, y); };</script>",
        1,
    )
    tab = opened(visit, page)

    def marks(plane: str) -> list[str]:
        stage(tab)
        tab.evaluate("window.marks = []")
        tab.get_by_role("button", name=plane).click()
        stage(tab)
        return [text for text, _ in sorted(tab.evaluate("window.marks.slice(-2)"), key=lambda mark: mark[1])]

    assert marks("Axial") == ["R", "L"] and marks("Coronal") == ["R", "L"] and marks("Sagittal") == ["A", "P"]
    tab.get_by_role("button", name="Neurological").click()
    assert marks("Axial") == ["L", "R"] and marks("Coronal") == ["L", "R"] and marks("Sagittal") == ["A", "P"]


def test_layers_are_shown_hidden_and_filled(visit: Visits) -> None:
    tab = opened(visit, document(case(kinds=("prediction", "reference", "uncertainty", "anomaly"))))
    both = stage(tab)
    assert near(both, REFERENCE).sum() > 100 and near(both, PREDICTION).sum() > 100
    tab.get_by_role("checkbox", name="Reference").uncheck()
    without = stage(tab)
    assert near(without, REFERENCE).sum() < 20 < near(without, PREDICTION).sum()
    tab.get_by_label("Fill of Prediction").fill("100")
    assert near(stage(tab), CLASSES[0]).sum() > 500
    assert "block (fill)" in tab.locator(".viewer-legend").inner_text()
    tab.get_by_role("checkbox", name="Scan").uncheck()
    assert stage(tab).mean() < without.mean() - 0.05


def test_maps_lie_over_the_scan_with_a_legend(visit: Visits) -> None:
    tab = opened(visit, document(case(kinds=("uncertainty",))))
    before = stage(tab)
    assert np.ptp(before[40:], axis=-1).max() < 0.05, "grey"
    tab.get_by_role("checkbox", name="Uncertainty").check()
    after = stage(tab)
    coloured = np.ptp(after[40:], axis=-1) > 0.3
    assert coloured.sum() > 500
    assert tab.locator(".viewer-legend").inner_text().split() == ["Uncertainty", "0", "1"]
    # Where the map is 0, the scan is as it was.
    assert np.abs(after[40:] - before[40:])[~coloured].mean() < 0.01


def test_a_value_beyond_the_scale_of_its_map_is_said_to_be_larger(visit: Visits) -> None:
    """The page holds a map up to its 99.9th percentile, here 0.7; where the cross is, the file has 0.9."""
    scan, heat = np.random.default_rng(0).random((24, 28, 20)), np.full((24, 28, 20), 0.7)
    heat[12, 14, 10] = 0.9
    tab = opened(visit, document(case(layers=[Layer("scan", scan), Layer("uncertainty", heat)])))
    tab.get_by_role("checkbox", name="Uncertainty").check()
    assert tab.locator(".viewer-legend").inner_text().split() == ["Uncertainty", "0", "≥", "0.7"]
    assert "Uncertainty: ≥ 0.7" in tab.locator(".viewer-place").inner_text()


def test_a_case_is_chosen_from_the_list_or_by_the_page(visit: Visits) -> None:
    empty = case("second", affine=np.eye(4), layers=[Layer("scan", np.random.default_rng(0).random((9, 30, 12)))])
    tab = opened(visit, document(case("first"), empty))
    first = stage(tab)
    tab.select_option(".viewer-case", "1")
    second = stage(tab)
    assert not same(first, second)
    assert tab.locator(".viewer-layer").count() == 1
    tab.evaluate("document.dispatchEvent(new CustomEvent('show-case', {detail: 'first'}))")
    assert same(stage(tab), first)
    assert tab.locator(".viewer-case").input_value() == "0"


def test_a_case_is_asked_for_before_the_viewer_was_in_sight(visit: Visits) -> None:
    below = document(case("first"), case("second")).replace("<body>", '<body><div style="height: 3000px"></div>', 1)
    tab = visit(below, SMALL)
    assert tab.locator(".viewer[data-ready]").count() == 0
    tab.evaluate("document.dispatchEvent(new CustomEvent('show-case', {detail: 'second'}))")
    tab.wait_for_selector(".viewer[data-ready]")
    assert np.ptp(stage(tab)) > 0.5 and tab.locator(".viewer-case").input_value() == "1"
    assert "second" in tab.locator(".viewer-canvas").get_attribute("aria-label")


def test_an_image_file_is_drawn_as_it_is_and_without_marks(visit: Visits) -> None:
    image = np.zeros((40, 30, 1))
    image[2:10, 20:28] = 1.0  # left and up in the file
    flat = ViewedCase("photo", "", np.eye(4), [Layer("scan", image)], oriented=False)
    tab = opened(visit, document(flat))
    picture = stage(tab)
    _, bottom, _, right = extent(picture.min(axis=-1) > 0.8)
    assert right < picture.shape[1] / 2 and bottom < picture.shape[0] / 2
    assert not tab.locator(".viewer-sides").is_visible() and not tab.locator(".viewer-planes").is_visible()
    assert "mm" not in tab.locator(".viewer-place").inner_text() + tab.locator(".viewer-note").inner_text()


def test_a_hostile_name_is_text(visit: Visits) -> None:
    tab = opened(visit, document(case(HOSTILE, reason=HOSTILE)))
    assert tab.locator("img[src=x]").count() == 0
    assert HOSTILE in tab.locator(".viewer-case option").first.inner_text()
    assert HOSTILE in tab.locator(".viewer-canvas").get_attribute("aria-label")


@pytest.mark.parametrize(("size", "dark"), [(PHONE, False), (PHONE, True), (DESKTOP, True)])
def test_it_fits_the_window(visit: Visits, size: tuple[int, int], dark: bool) -> None:
    tab = opened(
        visit, document(case("a name that is long " * 5, ("prediction", "reference", "anomaly"))), size, dark=dark
    )
    assert np.ptp(stage(tab)) > 0.5
    assert overflow(tab) == 0


@pytest.mark.parametrize("lack", ["webgl", "scripts"])
def test_still_pictures_take_its_place(visit: Visits, lack: str) -> None:
    tab = visit(document(case("first"), case("second")), **{lack: False})
    stills = tab.locator(".viewer-still img")
    assert stills.count() == 2 and all(still.is_visible() for still in stills.all())
    assert not tab.locator(".viewer-canvas").is_visible()
    assert tab.locator(".viewer-missing").is_visible() == (lack == "webgl")


def test_still_pictures_are_printed(visit: Visits) -> None:
    tab = opened(visit, document(case()))
    assert not tab.locator(".viewer-still").is_visible()
    tab.emulate_media(media="print")
    assert tab.locator(".viewer-still").is_visible() and not tab.locator(".viewer-canvas").is_visible()
