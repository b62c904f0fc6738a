"""The scans that a user names: lists, patterns, BIDS folders and files of channels, and where their results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.errors import InputError, UsageError
from medseg_diffusion.volumes.modality import ModelInput
from medseg_diffusion.volumes.outputs import refuse_collisions, segmentation_outputs
from medseg_diffusion.volumes.sources import InputOptions, Source, find_sources, read_source
from tests.helpers import volumes

T1 = ModelInput("brain-t1", ("T1",))
TWO = ModelInput("lesions", ("T1", "FLAIR"))


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def find(path: Path, takes: ModelInput = T1, **options: object) -> list[Source]:
    return find_sources([path], takes, InputOptions(**options))  # type: ignore[arg-type]


def masks(sources: list[Source], output: Path) -> list[str]:
    """The masks of scans, relative to the folder given with -o."""
    outputs = {one.path: segmentation_outputs(one.named, one.output(output), len(sources)) for one in sources}
    refuse_collisions(outputs)
    return [str(files["segmentation"].relative_to(output)) for files in outputs.values()]


def files(sources: list[Source], root: Path) -> list[str]:
    return [str(one.path.relative_to(root)) for one in sources]


def test_a_list_names_scans_relative_to_itself(tmp_path: Path) -> None:
    """Comments and empty lines do not count; equal names in different folders have results in these folders."""
    touch(tmp_path / "study", "a/T1.nii.gz", "b/T1.nii.gz")
    touch(tmp_path, "elsewhere/T1.nii.gz")
    listed = tmp_path / "study" / "scans.txt"
    listed.write_text(f"# two\na/T1.nii.gz\n\n  b/T1.nii.gz  \r\na/T1.nii.gz\n{tmp_path}/elsewhere/T1.nii.gz\n")
    sources = find(listed)
    assert len(sources) == 3
    outside = "/".join((*(tmp_path / "elsewhere").parts[1:], "T1_seg.nii.gz"))
    assert masks(sources, tmp_path / "out") == ["a/T1_seg.nii.gz", "b/T1_seg.nii.gz", outside]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.nii.gz\n# x\nmissing.nii.gz\n", r"scans.txt: found in line 3, missing.nii.gz: no such file"),
        ("notes.docx\n", r"in line 1, notes.docx: the suffix '.docx'"),
        ("other.txt\n", r"in line 1, other.txt: the suffix '.txt'"),
        ("# nothing\n", "a list without paths"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(content: str, message: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "notes.docx", "other.txt")
    (tmp_path / "scans.txt").write_text(content)
    with pytest.raises(InputError, match=message):
        find(tmp_path / "scans.txt")


def test_a_pattern_reads_subfolders_and_leaves_results_out(tmp_path: Path) -> None:
    touch(
        tmp_path, *[f"{one}/anat/{one}_T1w.nii.gz" for one in ("s1", "s2")], "s1/anat/s1_T2w.nii.gz", "top_T1w.nii.gz"
    )
    touch(
        tmp_path, "out/s1_T1w_seg.nii.gz", ".cache/s1_T1w.nii.gz", "s1/anat/s1_T1w.json", "s1/anat/s1_T1w_preview.png"
    )
    sources = find(tmp_path, pattern="**/*_T1w*")
    assert sorted(files(sources, tmp_path)) == ["s1/anat/s1_T1w.nii.gz", "s2/anat/s2_T1w.nii.gz", "top_T1w.nii.gz"]
    assert sorted(masks(sources, tmp_path / "out"))[0] == "s1/anat/s1_T1w_seg.nii.gz"
    with pytest.raises(InputError, match=r"found nothing that matches \*\*/\*_FLAIR.nii.gz; expected scans"):
        find(tmp_path, pattern="**/*_FLAIR.nii.gz")
    with pytest.raises(InputError, match=r"found only results \(1 files\) that matches"):
        find(tmp_path, pattern="out/*.nii.gz")
    with pytest.raises(UsageError, match="expected a path relative to the folder"):
        find(tmp_path, pattern="/**/*.nii.gz")
    with pytest.raises(UsageError, match="--pattern is for folders"):
        find(tmp_path / "top_T1w.nii.gz", pattern="*")


def test_a_lost_link_under_a_pattern_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/T1.nii.gz")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "T1.nii.gz").symlink_to(tmp_path / "annex" / "gone")
    with pytest.raises(InputError, match=r"b/T1.nii.gz: found a link to a file that does not exist"):
        find(tmp_path, pattern="*/T1.nii.gz")


def bids(root: Path, *names: str) -> Path:
    return touch(root, "dataset_description.json", "participants.tsv", *names)


def test_a_bids_folder_gives_the_models_images_without_derivatives(tmp_path: Path) -> None:
    bids(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii",
        "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.json",
        "derivatives/prep/sub-01/anat/sub-01_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
    )
    plain = find(tmp_path)
    assert files(plain, tmp_path) == ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_run-1_T1w.nii"]
    assert masks(plain, tmp_path / "derivatives")[0] == "sub-01/anat/sub-01_T1w_seg.nii.gz"
    with_agent = find(tmp_path, ModelInput("tumour", ("T1c",)))
    assert files(with_agent, tmp_path) == ["sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz"]
    flair = find(tmp_path, ModelInput("flair-anomaly", ("image",)))
    assert files(flair, tmp_path) == ["sub-01/anat/sub-01_FLAIR.nii.gz"]
    with pytest.raises(InputError, match=r"a BIDS folder without sub-\*/\*\*/anat/\*_T2w.nii.gz; expected T2 images"):
        find(tmp_path, ModelInput("t2", ("T2",)))
    with pytest.raises(
        UsageError, match=r"the model any \(1 channel: image\) does not say .* name them with --pattern"
    ):
        find(tmp_path, ModelInput("any", ("image",)))


def test_channels_of_a_bids_folder_belong_together_by_subject(tmp_path: Path) -> None:
    """A subject without one of the channels fails alone, by the name of the missing file."""
    names = [f"sub-0{i}/anat/sub-0{i}_{kind}.nii.gz" for i, kind in ((1, "T1w"), (1, "FLAIR"), (2, "T1w"))]
    bids(tmp_path, *names)
    first, second = find(tmp_path, TWO)
    assert [path.name for path in first.files] == ["sub-01_T1w.nii.gz", "sub-01_FLAIR.nii.gz"]
    volumes.save(second.path)
    with pytest.raises(InputError, match=r"sub-02_FLAIR.nii.gz: found no such file"):
        read_source(second, TWO)


def test_a_subject_without_the_first_channel_is_named(tmp_path: Path) -> None:
    bids(
        tmp_path, *[f"sub-01/anat/sub-01_{kind}.nii.gz" for kind in ("T1w", "FLAIR")], "sub-02/anat/sub-02_FLAIR.nii.gz"
    )
    _, second = find(tmp_path, TWO)
    with pytest.raises(InputError, match=r"sub-02_T1w.nii.gz: found no such file"):
        read_source(second, TWO)


def test_nnunets_names_are_channels_of_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c.nii.gz")
    sources = find(tmp_path, TWO)
    assert [[path.name for path in one.files] for one in sources] == [
        ["a_0000.nii.gz", "a_0001.nii.gz"],
        ["b_0000.nii.gz"],
        ["c.nii.gz"],
    ]
    assert masks(sources, tmp_path)[0] == "a_seg.nii.gz"
    for name in ("a_0000.nii.gz", "a_0001.nii.gz"):
        assert find(tmp_path / name, TWO) == sources[:1]


def test_four_digits_are_no_channels_where_cases_have_numbers(tmp_path: Path) -> None:
    touch(tmp_path, *[f"case_000{i}.nii.gz" for i in range(5)])
    assert [len(one.files) for one in find(tmp_path, TWO)] == [1] * 5
    names = [f"case_000{i}_seg.nii.gz" for i in range(5)]
    assert masks(find(tmp_path, T1), tmp_path) == names


def test_a_single_channel_has_no_number(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "b.nii.gz", "c_0001.nii.gz", "d_0000.png")
    assert masks(find_sources(sorted(tmp_path.iterdir()), T1), tmp_path) == [
        "a_seg.nii.gz",
        "b_seg.nii.gz",
        "b_0000_seg.nii.gz",
        "c_0001_seg.nii.gz",
        "d_0000_seg.png",
    ]


def test_named_channels_are_read_in_the_models_order(tmp_path: Path) -> None:
    t1, flair = volumes.save(tmp_path / "x.nii.gz") or tmp_path / "x.nii.gz", tmp_path / "y.nii.gz"
    volumes.save(flair, volumes.values() + 1000)
    options = InputOptions(channels=(("flair", flair), ("t1", t1)))
    (source,) = find_sources([], TWO, options)
    volume = read_source(source, TWO)
    assert volume.data.shape == (2, *volumes.SHAPE) and volume.source == t1
    assert float((volume.data[1] - volume.data[0]).min()) == pytest.approx(1000, abs=0.01)
    assert masks([source], tmp_path) == ["x_seg.nii.gz"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["t1"], "--channel FLAIR=FILE is missing; the model has the channels T1, FLAIR"),
        (["t1", "flair", "t2"], "--channel t2: unknown; the model lesions has T1, FLAIR"),
        (["t1", "T1"], "--channel T1: given twice; the model lesions has T1, FLAIR"),
    ],
)
def test_wrong_channels_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    channels = tuple((name, tmp_path / "a.nii.gz") for name in names)
    with pytest.raises(UsageError, match=message):
        find_sources([], TWO, InputOptions(channels=channels))
    with pytest.raises(UsageError, match="leave SCAN and --pattern out"):
        find_sources([tmp_path], TWO, InputOptions(channels=channels))


def test_channels_on_different_grids_are_refused(tmp_path: Path) -> None:
    volumes.save(tmp_path / "a_0000.nii.gz")
    moved = volumes.oblique()
    moved[0, 3] += 5
    volumes.save(tmp_path / "a_0001.nii.gz", affine=moved)
    (source,) = find(tmp_path, TWO)
    with pytest.raises(
        InputError, match=r"a_0001.nii.gz: found a grid up to 5 mm away; expected the position of .*0000"
    ):
        read_source(source, TWO)


def test_a_case_without_all_channels_names_them(tmp_path: Path) -> None:
    three = ModelInput("three", ("T1", "T2", "FLAIR"))
    touch(tmp_path, "a_0000.nii.gz", "a_0002.nii.gz")
    (source,) = find(tmp_path, three)
    with pytest.raises(InputError, match=r"2 files \(a_0000.nii.gz, a_0002.nii.gz\); .*: T1, T2, FLAIR"):
        read_source(source, three)


# ---- formats that are not read ---------------------------------------------------------------------------------------


def test_scans_in_formats_that_are_not_read_are_named_once_for_the_call(tmp_path: Path) -> None:
    """In folders, in those of a list, and under a pattern; what describes a scan is none."""
    touch(tmp_path / "a", "a.nii.gz", "b.mgz", "c.hdr", "c.img", ".d.mgz", "e_seg.nii.gz")
    touch(tmp_path / "a", "a.json", "a.bval", "a.bvec", "a.csv", "a.tsv", "README", "a.txt", "a.raw", "t.gz")
    touch(tmp_path / "b", "x.nii.bz2", "x.nii", "deeper/y.mnc")
    (tmp_path / "list.txt").write_text("b\n")
    with pytest.warns(UserWarning) as said:
        sources = find_sources([tmp_path / "a", tmp_path / "list.txt", tmp_path / "b"], T1)
    assert files(sources, tmp_path) == ["a/a.nii.gz", "b/x.nii"]
    first = ", ".join(str(tmp_path / "a" / name) for name in ("b.mgz", "c.hdr", "c.img"))
    assert [str(one.message) for one in said] == [
        f"left out 4 files in formats that are not read ({first} and 1 more); convert them to NIfTI"
    ]
    with pytest.warns(UserWarning, match=r"left out 1 file in formats that are not read \(\S+/b/x\.nii\.bz2\)"):
        assert files(find(tmp_path, pattern="b/x.*"), tmp_path) == ["b/x.nii"]


@pytest.mark.parametrize("pattern", [None, "*"])
def test_a_folder_of_formats_that_are_not_read_says_what_to_do(tmp_path: Path, pattern: str | None) -> None:
    touch(tmp_path, *[f"{name}.npy" for name in "abcd"], "a_seg.nii.gz", "a.json")
    with pytest.raises(
        InputError,
        match=r"found no scan.*, but 4 files in formats that are not read \(a\.npy, b\.npy, c\.npy and 1 more\); .*; "
        "convert them to NIfTI$",
    ):
        find(tmp_path, pattern=pattern)


def test_the_choice_of_a_series_needs_dicom(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    with pytest.raises(
        UsageError, match="--series chooses one of several DICOM series, but none of the scans is DICOM"
    ):
        find(tmp_path, series="3")
