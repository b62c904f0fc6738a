"""Collections of images: the official Tiny ImageNet layout, plain folders, scans and broken files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from medseg_diffusion.data.cases import find_cases, split_by_hash
from medseg_diffusion.data.image_cache import packed
from medseg_diffusion.data.image_check import check_images
from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError
from medseg_diffusion.volumes.paths import scan_name
from tests.helpers.tiny_imagenet import tiny_imagenet


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.mark.parametrize("as_zip", [False, True])
def test_tiny_imagenet_is_read_from_folder_and_zip(tmp_path: Path, as_zip) -> None:
    folder = tiny_imagenet(tmp_path)
    found = find_images(zipped(folder) if as_zip else folder)
    assert found.kind == "tiny-imagenet"
    assert found.classes == ("goldfish", "bullfrog")  # in the order of the sorted ids
    parts = [(entry.part, entry.label) for entry in found.entries]
    assert parts.count(("train", 0)) == parts.count(("train", 1)) == 3
    # val_0 belongs to n02, which comes second when sorted.
    assert [label for part, label in parts if part == "validation"] == [1, 0, 1, 0]
    assert parts.count(("test", -1)) == 5
    assert found.entries[1].box == (1, 1, 60, 61)
    grey = found.pixels(found.entries[0], (64, 64), 3)
    assert grey.shape == (1, 64, 64, 3)
    assert np.ptp(grey, axis=3).max() == 0


def test_a_folder_of_images_has_its_subfolders_as_classes_and_sides_by_hash(tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / "data" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, i, i)).save(path)
    images = packed(tmp_path / "data", tmp_path / "store", 16, held_out=(3, 2))
    assert images.classes == ("cats", "dogs")
    assert {part: len(found) for part, found in images.parts.items()} == {"train": 7, "validation": 2, "test": 3}
    assert all(images.classes[images.labels[i]] == name.split("/")[0] for i, name in enumerate(images.names))


def test_a_folder_of_scans_gives_the_slices_that_show_something_and_splits_by_scan(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for i in range(4):
        data = np.zeros((24, 30, 10), np.float32)
        data[4:20, 5:25, 2:8] = 100 + np.arange(16)[:, None, None]
        nib.save(nib.Nifti1Image(data * 10**i, np.eye(4)), tmp_path / "data" / f"scan{i}.nii.gz")
    images = packed(tmp_path / "data", tmp_path / "store", 32, 1, held_out=(1, 1))
    assert images.images.shape == (4 * 6, 32, 32, 1)
    assert {part: len(found) for part, found in images.parts.items()} == {"train": 12, "validation": 6, "test": 6}
    for part, count in (("train", 2), ("validation", 1), ("test", 1)):
        assert len({images.names[i] for i in images.part(part)}) == count
    # The unit of the intensities does not matter.
    assert np.abs(images.images[:6].astype(int) - images.images[6:12].astype(int)).max() <= 1


@pytest.mark.parametrize("layout", [("imagesTr", "labelsTr"), ("images", "masks")])
def test_of_a_labelled_folder_only_the_images_are_taken_with_the_sides_of_its_cases(tmp_path: Path, layout) -> None:
    for part in layout:
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(9):
            data = np.random.default_rng(i).integers(0, 2 if part == layout[1] else 99, (12, 12, 3)).astype(np.uint8)
            nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "data" / part / f"case{i}.nii.gz")
    images = packed(tmp_path / "data", tmp_path / "store", 12, 1, held_out=(3, 2))
    cases = find_cases(tmp_path / "data").cases
    split = split_by_hash(cases, 3, 2)
    for part, names in (("train", split.train), ("validation", split.validation), ("test", split.test)):
        found = {scan_name(images.names[i]) for i in images.part(part)}
        assert found == set(names) and all(images.names[i].startswith(layout[0]) for i in images.part(part))


@pytest.mark.parametrize("layout", [("imagesTr", "labelsTr"), ("images", "masks")])
def test_the_masks_of_a_zipped_labelled_folder_are_no_images(tmp_path: Path, layout: tuple[str, str]) -> None:
    """Most zips hold one folder, in which all lies; so do folders into which they were unpacked."""
    for name in [f"{part}/{case}.png" for part in layout for case in "ab"]:
        (tmp_path / "outer" / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "outer" / "data" / name)
    expected = [f"data/{layout[0]}/{case}.png" for case in "ab"]
    assert [entry.name for entry in find_images(tmp_path / "outer").entries] == expected
    archive = zipped(tmp_path / "outer" / "data")
    assert [entry.name for entry in find_images(archive).entries] == expected
    archive.unlink()
    (tmp_path / "outer" / "data" / "patients.csv").write_text("case,patient\na,1\nb,1\n")
    with pytest.raises(InputError, match=r"patients.csv in data/"):
        find_images(tmp_path / "outer")


@pytest.mark.parametrize("suffix", ["nii.gz", "png"])
def test_the_channels_of_a_case_stay_together_as_in_a_segmenter(tmp_path: Path, suffix: str, monkeypatch) -> None:
    """The numbered files of one nnU-Net case were separate groups: one patient was in training and test."""
    folder = tmp_path / "data"
    data = np.random.default_rng(0).integers(0, 2, (4, 4, 1)).astype(np.uint8)
    images = [f"imagesTr/{case}_{channel:04d}" for case in "abcdef" for channel in range(2)]
    for name in (*images, *(f"labelsTr/{case}" for case in "abcdef")):
        path = folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "png":
            Image.fromarray(data[..., 0]).save(path)
        else:
            nib.save(nib.Nifti1Image(data, np.eye(4)), path)

    def groups() -> dict[str, str]:
        return {entry.name.removesuffix(f".{suffix}"): entry.group for entry in find_images(folder).entries}

    def patients() -> dict[str, str]:
        return {case.name: case.patient for case in find_cases(folder).cases}

    assert patients() == {case: case for case in "abcdef"}
    assert groups() == {name: patients()[Path(name).name[0]] for name in images}
    alone = {entry.name.removesuffix(f".{suffix}"): entry.group for entry in find_images(folder / "imagesTr").entries}
    assert {f"imagesTr/{name}": group for name, group in alone.items()} == groups()
    monkeypatch.chdir(folder / "imagesTr")
    assert {entry.group for entry in find_images(Path()).entries} == set("abcdef")
    rows = [f"{case},{'left' if case in 'abc' else 'right'}" for case in "abcdef"]
    (folder / "patients.csv").write_text("\n".join(["case,patient", *rows]))
    assert set(patients().values()) == {"left", "right"}
    assert groups() == {name: patients()[Path(name).name[0]] for name in images}


def test_an_image_that_has_a_label_of_its_own_is_no_channel(tmp_path: Path) -> None:
    names = ["images/a", "images/a_0000", "labels/a", "labels/a_0000_seg", "images/b_2019", "labels/b_2019"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    assert [entry.group for entry in find_images(tmp_path).entries] == ["a", "a_0000", "b_2019"]


def test_a_truncated_image_is_named_or_skipped(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path)
    bad = folder / "train" / "n01" / "images" / "n01_1.JPEG"
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"n01_1\.JPEG: found a broken image .*--skip-broken"):
        packed(folder, tmp_path / "store", 64)
    assert not list((tmp_path / "store").iterdir())  # nothing half-packed
    images = packed(folder, tmp_path / "store", 64, skip_broken=True)
    assert len(images.part("train")) == 5
    assert images.skipped == ("train/n01/images/n01_1.JPEG",)
    check = check_images(find_images(folder))
    assert len(check.broken) == 1 and "n01_1.JPEG" in check.broken[0]
    assert check.modes == {"RGB": 12, "L": 2}
    assert check.sizes == {"64 x 64": 14}


def damaged_zip(path: Path) -> Path:
    """A whole image, and three that zipfile refuses: a broken stream, encryption, an unknown compression."""
    names = ["encrypted.png", "stream.png", "unknown.png", "whole.png"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            buffer = io.BytesIO()
            Image.new("L", (9, 9), 70).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
        start = archive.getinfo("stream.png").header_offset + 30 + len("stream.png")
    content = bytearray(path.read_bytes())
    content[start] = 0xFF  # a block of a type that deflate does not have
    directory = [content.rindex(name.encode()) - 46 for name in names]
    content[directory[0] + 8] |= 1  # the flag of encryption
    content[directory[2] + 10] = 99  # the number of the compression
    path.write_bytes(content)
    return path


def test_unreadable_entries_of_a_zip_are_listed_and_skipped(tmp_path: Path) -> None:
    source = damaged_zip(tmp_path / "images.zip")
    broken = check_images(find_images(source)).broken
    assert [text.partition(": ")[0].rpartition("/")[2] for text in broken] == [
        "encrypted.png", "stream.png", "unknown.png"]  # fmt: skip
    assert all("found an unreadable entry (" in text and "\n" not in text for text in broken)
    images = packed(source, tmp_path / "store", 9, 1, skip_broken=True, held_out=(0, 0))
    assert images.names == ("whole.png",) and images.images.max() == 70


@pytest.mark.parametrize(
    ("file", "row", "columns"),
    [
        ("val/val_annotations.txt", "val_0.JPEG", 6),
        ("val/val_annotations.txt", "val_0.JPEG\tn02\t0\t0\tten\t10", 6),
        ("train/n01/n01_boxes.txt", "n01_0.JPEG\t1\t2\t3", 5),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, file, row, columns) -> None:
    folder = tiny_imagenet(tmp_path)
    path = folder / file
    path.write_text("\n" + path.read_text() + row + "\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(InputError, match=rf"{file}, line {line}: found '.*'; expected {columns} columns between tabs"):
        find_images(folder)


@pytest.mark.parametrize(("suffix", "kind"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "<i4")])
def test_levels_of_sixteen_bits_become_eight(tmp_path: Path, suffix, kind) -> None:
    (tmp_path / "data").mkdir()
    levels = np.array([[0, 128, 129, 257], [32767, 32768, 60000, 65535]] * 2).astype(kind)
    Image.fromarray(levels).save(tmp_path / "data" / f"deep.{suffix}")
    wanted = np.round(levels.astype(float) / 257).astype(np.uint8)
    assert (int(wanted.min()), int(wanted.max())) == (0, 255)
    collection = find_images(tmp_path / "data")
    assert np.array_equal(collection.pixels(collection.entries[0], (4, 4), 1)[0, :, :, 0], wanted)
    assert np.array_equal(collection.pixels(collection.entries[0], (4, 4), 3)[0], np.repeat(wanted[..., None], 3, 2))


def test_levels_of_no_stated_depth_stay_and_those_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, levels in (
        ("a", np.full((4, 4), 200, np.int32)),
        ("b", np.full((4, 4), 0.5, np.float32)),
        ("c", np.full((4, 4), 65536, np.int32)),
        ("d", np.full((4, 4), -1, np.int32)),
    ):
        Image.fromarray(levels).save(tmp_path / "data" / f"{name}.tif")
    collection = find_images(tmp_path / "data")
    assert int(collection.pixels(collection.entries[0], (4, 4), 1).max()) == 200
    for entry, mode in zip(collection.entries[1:], "FII", strict=True):
        with pytest.raises(InputError, match=rf"{entry.name}: found levels that no 16 bits hold \(mode {mode}\)"):
            collection.pixels(entry, (4, 4), 1)
    assert len(check_images(collection).broken) == 3


def test_no_program_is_started_for_a_file_of_another_format(tmp_path: Path, monkeypatch) -> None:
    """Pillow runs Ghostscript on PostScript whatever the file's name; in a zip of anyone that is an attack."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **named: started.append(given))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    collection = find_images(tmp_path)
    with pytest.raises(InputError, match=r"a\.png: found a broken image \(of another format\).*--skip-broken"):
        collection.pixels(collection.entries[0], (8, 8), 3)
    assert not started


def test_images_of_several_pages_and_transparency_are_named(tmp_path: Path) -> None:
    """Only the first page was taken, and of transparent pixels the colours that no viewer shows."""
    pages = [Image.new("L", (8, 8), level) for level in (1, 2, 3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(tmp_path / "hidden.png")
    Image.new("RGBA", (8, 8), (9, 8, 7, 255)).save(tmp_path / "opaque.png")
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "photo.webp", lossless=True)
    check = check_images(find_images(tmp_path))
    assert len(check.broken) == 2
    assert "hidden.png: found transparent pixels; expected an opaque image" in check.broken[0]
    assert "pages.tif: found 3 images in one file; expected a single image" in check.broken[1]
    images = packed(tmp_path, tmp_path.with_name("store"), 8, skip_broken=True)
    assert images.names == ("opaque.png", "photo.webp") and np.ptp(images.images, axis=(0, 1, 2)).max() == 0


def test_a_missing_class_folder_and_a_wrong_zip_are_refused(tmp_path: Path) -> None:
    folder = tiny_imagenet(tmp_path)
    for file in (folder / "train" / "n02" / "images").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"train/n02/images: found no images; expected those of class n02"):
        find_images(folder)
    wrong = tmp_path / "wrong.zip"
    with zipfile.ZipFile(wrong, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(InputError, match="found 1 files, none of them an image"):
        find_images(wrong)
    wrong.write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="found no readable zip"):
        find_images(wrong)
    with pytest.raises(InputError, match="no such file or folder"):
        find_images(tmp_path / "nothing")


@pytest.mark.parametrize("as_zip", [False, True])
def test_images_and_scans_together_are_refused(tmp_path: Path, as_zip: bool) -> None:
    """One picture among scans would be all that a generator learns from."""
    folder = tmp_path / "data"
    for i in range(5):
        (folder / f"p{i}").mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.ones((8, 8, 3), np.float32), np.eye(4)), folder / f"p{i}" / "t1.nii.gz")
    Image.new("L", (8, 8)).save(folder / "logo.png")
    source = zipped(folder) if as_zip else folder
    inside = "data/" if as_zip else ""
    message = (
        rf"^{source}: found both images \(1: {inside}logo\.png\) and scans \(5: {inside}p0/t1\.nii\.gz, "
        rf"{inside}p1/t1\.nii\.gz and 3 more\); expected files of one kind; put each kind into a folder of its own$"
    )
    with pytest.raises(InputError, match=message):
        packed(source, tmp_path / "store", 8)
    assert not (tmp_path / "store").exists()


def test_images_beside_labels_of_another_format_are_no_mixture(tmp_path: Path) -> None:
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    nib.save(nib.Nifti1Image(np.ones((8, 8, 1), np.uint8), np.eye(4)), tmp_path / "labels" / "a.nii.gz")
    assert [entry.name for entry in find_images(tmp_path).entries] == ["images/a.png"]


def test_scans_of_a_patient_stay_together(tmp_path: Path) -> None:
    """By file names alone all T1 would be on one side and all FLAIR on another."""
    for patient in range(6):
        for kind in ("t1", "flair"):
            path = tmp_path / "data" / "scans" / f"p{patient}" / f"{kind}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(patient).random((8, 8, 3)).astype(np.float32)
            nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    found = find_images(tmp_path / "data")
    assert {entry.group for entry in found.entries} == {f"p{i}" for i in range(6)}
    images = packed(tmp_path / "data", tmp_path / "store", 8, 1, held_out=(1, 1))
    sides = {part: {images.names[i].split("/")[1] for i in images.part(part)} for part in images.parts}
    assert [len(sides[part]) for part in ("train", "validation", "test")] == [4, 1, 1]
    assert len(set().union(*sides.values())) == 6
    with pytest.raises(InputError, match="found 6 scans or subfolders of them"):
        packed(tmp_path / "data", tmp_path / "store", 8, 1, held_out=(4, 2))


@pytest.mark.parametrize("layout", ["images", "labelled"])
def test_patients_csv_names_the_patients_of_images(tmp_path: Path, layout: str) -> None:
    for folder in ("images", "labels") if layout == "labelled" else (".",):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in ("a1", "a2", "b1", "b2"):
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "patients.csv").write_text("case,patient\na1,a\na2,a\nb1,b\nb2,b\n")
    assert {Path(entry.name).stem: entry.group for entry in find_images(tmp_path).entries} == {
        "a1": "a", "a2": "a", "b1": "b", "b2": "b",
    }  # fmt: skip
    if layout == "labelled":
        assert {entry.group for entry in find_images(tmp_path / "images").entries} == {"a", "b"}
    with pytest.raises(InputError, match=r"patients\.csv in a zip"):
        find_images(zipped(tmp_path))
    tmp_path.with_suffix(".zip").unlink()
    (tmp_path / "patients.csv").write_text("case,patient\na1,a\n")
    with pytest.raises(InputError, match="no row for case a2 and 2 more"):
        find_images(tmp_path)
