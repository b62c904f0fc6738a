"""Which kind of image a channel, a model or a DICOM series is, by its name."""

from __future__ import annotations

import pytest

from medseg_diffusion.volumes.modality import ModelInput, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("T1 precontrast", "T1"),
        ("T1 noncontrast", "T1"),
        ("t1 pre-contrast", "T1"),
        ("AX T1 POST NON FS", "T1c"),
        ("T1 +C pre-op", "T1c"),
        ("T1 MPRAGE post no fatsat contrast", "T1c"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"),
        ("T2 star", None),
        ("T2*", None),
    ],
)
def test_kinds_by_descriptions_of_scanners(text: str, kind: str | None) -> None:
    assert kind_of(text) == kind


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *[(name, "T1") for name in ("T1", "T1w", "t1n", "t1_mprage_sag", "3DT1 TFE", "t1_space", "AX T1 pre contrast")],
        *[(name, "T1c") for name in ("t1c", "T1ce", "t1gd", "T1 POST GD", "AX T1 +C", "t1 C+")],
        *[(name, "T2") for name in ("t2", "T2w", "AX T2 posterior")],
        *[(name, "FLAIR") for name in ("FLAIR", "t2_space_flair", "t2f")],
        *[(name, "MR") for name in ("MRI", "MR")],
        ("lung-nodule-ct", "CT"),
        *[(name, None) for name in ("image", "AX T1 FLAIR", "T2* GRE", "Part1", "PET CT", "")],
    ],
)
def test_kinds_by_names(text: str, kind: str | None) -> None:
    """A text that names two kinds, such as T1 FLAIR, names none: no series is chosen by a guess."""
    assert kind_of(text) == kind


def test_the_models_name_tells_what_a_single_channel_is() -> None:
    assert ModelInput("flair-anomaly", ("image",)).kinds == ("FLAIR",)
    assert ModelInput("hippocampus-t1", ("MRI",)).kinds == ("T1",)
    assert ModelInput("a-ct-model", ("T1",)).kinds == ("T1",)  # the channel comes first
    assert ModelInput("t1-lesions", ("T1", "image")).kinds == ("T1", None)
