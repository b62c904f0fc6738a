"""PNG, JPEG, TIFF and BMP as volumes of one slice: where pixels lie, what their values are, what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from medseg_diffusion.data.images import find_images
from medseg_diffusion.errors import InputError, MedsegError, UsageError
from medseg_diffusion.volumes import raster
from medseg_diffusion.volumes.inputs import find_scans
from medseg_diffusion.volumes.io import read_labels, read_map, read_volume, write_labels, write_map
from medseg_diffusion.volumes.paths import IMAGE_SUFFIXES, SUFFIXES, VOLUME_SUFFIXES, is_image
from medseg_diffusion.volumes.volume import Volume

WIDTH, HEIGHT = 7, 5
ORIENTATION = 0x0112  # the EXIF tag


def pixels(channels: int = 1, dtype: type = np.uint8) -> np.ndarray:
    """(H, W) or (H, W, 3), no two pixels alike, up to 100."""
    grey = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    return (grey if channels == 1 else np.stack([grey, grey + 30, 100 - grey], axis=2)).astype(dtype)


def save(path: Path, picture: np.ndarray | Image.Image | None = None, **options: object) -> Path:
    image = pixels() if picture is None else picture
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def palette(indices: np.ndarray) -> Image.Image:
    """An image whose index i has the colour (255 - i, 2 i, 3 i)."""
    image = Image.fromarray(indices).convert("L")
    image.putpalette([value % 256 for i in range(256) for value in (255 - i, 2 * i, 3 * i)])
    return image


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s not in (".jpg", ".jpeg")])
def test_the_pixel_at_column_i_and_row_j_is_the_voxel_i_j(tmp_path: Path, suffix) -> None:
    grey, colour = read_volume(save(tmp_path / f"a{suffix}")), read_volume(save(tmp_path / f"b{suffix}", pixels(3)), 3)
    assert grey.data.shape == (1, WIDTH, HEIGHT, 1) and colour.data.shape == (3, WIDTH, HEIGHT, 1)
    assert grey.data[0, 6, 1, 0] == 13, "the last pixel of the second row"
    assert colour.data[:, 6, 1, 0].tolist() == [13, 43, 87], "red, green, blue"
    np.testing.assert_array_equal(grey.data[0, :, :, 0].numpy(), pixels().T)
    assert (grey.spacing, grey.axcodes) == ((1, 1, 1), "LPS")


def test_a_jpeg_is_read_to_its_precision(tmp_path: Path) -> None:
    smooth = np.tile(np.arange(64, dtype=np.uint8) * 3, (48, 1))
    for suffix in (".jpg", ".jpeg", ".JPG"):
        volume = read_volume(save(tmp_path / f"a{suffix}", smooth, quality=95))
        assert volume.shape == (64, 48, 1)
        assert np.abs(volume.data[0, :, :, 0].numpy() - smooth.T).max() < 3


def test_pixels_lie_where_itk_puts_them(tmp_path: Path) -> None:
    """A map of an image, written as NIfTI, must cover it in viewers that read both with ITK."""
    volume = read_volume(save(tmp_path / "a.png"))
    write_map(volume.data, volume, tmp_path / "a_prob.nii.gz")
    image, written = sitk.ReadImage(str(tmp_path / "a.png")), sitk.ReadImage(str(tmp_path / "a_prob.nii.gz"))
    for index in ((0, 0), (6, 1), (2, 4)):
        place = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(written.TransformIndexToPhysicalPoint((*index, 0))[:2], place)
        assert written[(*index, 0)] == image[index]
    assert nib.load(tmp_path / "a_prob.nii.gz").header.get_xyzt_units()[0] == "unknown"


@pytest.mark.parametrize(
    ("suffix", "picture", "dtype"),
    [
        (".png", pixels() > 10, np.uint8),
        (".png", pixels(dtype=np.uint16) * 600, np.uint16),
        (".tif", pixels(dtype=np.uint16) * 600, np.uint16),
        (".tif", pixels(dtype=np.int32) * 70000 - 5, np.int32),
        (".tif", pixels(dtype=np.float32) / 7, np.float32),
    ],
    ids=["bits", "16 bits", "16 bits in TIFF", "32 bits", "real numbers"],
)
def test_grey_values_of_any_depth_are_kept(tmp_path: Path, suffix, picture, dtype) -> None:
    opened = raster.open_image(save(tmp_path / f"a{suffix}", picture))
    assert opened.dtype == dtype and opened.shape == (WIDTH, HEIGHT, 1)
    np.testing.assert_array_equal(opened.load()[:, :, 0], picture.T.astype(dtype))


def test_big_endian_tiff(tmp_path: Path) -> None:
    values = pixels(dtype=np.uint16) * 600
    image = Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_volume(save(tmp_path / "a.tif", image)).data[0, :, :, 0].numpy(), values.T)


@pytest.mark.parametrize("kind", ["LA", "RGBA", "L with a transparent value", "RGB with a transparent colour"])
def test_an_opaque_alpha_channel_is_dropped_and_transparency_refused(tmp_path: Path, kind) -> None:
    picture = pixels(1 if kind[0] == "L" else 3)
    options: dict[str, object] = {}
    if "with" in kind:
        options = {"transparency": 250 if kind[0] == "L" else (250, 0, 0)}  # a value that no pixel has
        images = [Image.fromarray(picture)] * 2
        second = {"transparency": 10 if kind[0] == "L" else (10, 40, 90)}
    else:
        images = [Image.fromarray(picture).convert(kind) for _ in range(2)]
        images[1].putpixel((3, 2), (*([9] * (len(kind) - 1)), 254))
        second = {}
    opened = raster.open_image(save(tmp_path / "a.png", images[0], **options))
    np.testing.assert_array_equal(opened.load()[:, :, 0], picture.swapaxes(0, 1))
    with pytest.raises(InputError, match=r"b\.png: found transparent pixels; .*flatten"):
        read_volume(save(tmp_path / "b.png", images[1], **second), channels=None)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_of_a_palette_a_scan_has_the_colours_and_a_mask_the_indices(tmp_path: Path, suffix) -> None:
    path = save(tmp_path / f"a{suffix}", palette(pixels()))
    indices = pixels().T.astype(int)
    np.testing.assert_array_equal(read_labels(path).data[0, :, :, 0].numpy(), indices)
    np.testing.assert_array_equal(
        read_volume(path, channels=3).data[:, :, :, 0].numpy(), [255 - indices, 2 * indices, 3 * indices]
    )


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """What a viewer shows of stored rows and columns: the eight meanings of the tag in EXIF 2.32, 4.6.4."""
    turned = {
        1: stored,  # row 0 is the top, column 0 the left side
        2: stored[:, ::-1],  # column 0 is the right side
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,  # row 0 is the left side, column 0 the top
        6: stored.T[:, ::-1],  # row 0 is the right side, column 0 the top
        7: stored.T[::-1, ::-1],
        8: stored.T[::-1],
    }
    return turned[orientation]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_photograph_is_applied_to_shape_and_pixels(tmp_path: Path, suffix, orientation) -> None:
    stored = np.kron(np.array([[0, 120, 250], [60, 200, 30]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"tiffinfo": {ORIENTATION: orientation}} if suffix == ".tif" else {"exif": exif}
    volume = read_volume(save(tmp_path / f"a{suffix}", stored, **options))
    expected = upright(stored, orientation).T
    assert volume.shape == (*expected.shape, 1)
    assert np.abs(volume.data[0, :, :, 0].numpy() - expected).max() <= (8 if suffix == ".jpg" else 0)
    mask = torch.from_numpy((expected > 100).astype(np.uint8))[:, :, None]
    write_labels(mask, volume, tmp_path / "a_seg.png")
    assert not Image.open(tmp_path / "a_seg.png").getexif()
    assert torch.equal(read_labels(tmp_path / "a_seg.png").data[0], mask.int())


def test_a_colour_may_be_missing_but_not_all_contrast(tmp_path: Path) -> None:
    """A stain that only shines in blue leaves red and green black."""
    blue = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    blue[..., 2] = pixels()
    assert read_volume(save(tmp_path / "a.png", blue), channels=3).data.amax(dim=(1, 2, 3)).tolist() == [0, 0, 34]
    with pytest.raises(InputError, match="found the constant value 0 in channel 0; expected an image with contrast"):
        read_volume(save(tmp_path / "b.png", blue * 0), channels=3)
    with pytest.raises(InputError, match="found the constant value 0; expected an image with contrast"):
        read_volume(save(tmp_path / "c.png", blue[..., 0]))


# ---- bad input -------------------------------------------------------------------------------------------------------


def content(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


WHOLE = {
    ".png": content("PNG"),
    ".jpg": content("JPEG"),
    ".tif": content("TIFF"),
    ".tiff": content("TIFF", compression="tiff_deflate"),
    ".bmp": content("BMP"),
}


@pytest.mark.parametrize("suffix", WHOLE)
@settings(deadline=None, max_examples=60)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_anywhere_is_refused_or_complete(tmp_path_factory, suffix, kept) -> None:
    """Pillow opens most of them without a word. What may be missing are closing bytes after the last pixel."""
    whole = tmp_path_factory.getbasetemp() / f"whole{suffix}"
    whole.write_bytes(WHOLE[suffix])
    cut = tmp_path_factory.getbasetemp() / f"cut{suffix}"
    cut.write_bytes(WHOLE[suffix][: int(kept * len(WHOLE[suffix]))])
    try:
        found = read_volume(cut, channels=3)
    except InputError as error:
        assert str(error).startswith(f"{cut}: found an unreadable file") and "\n" not in str(error)
    else:
        assert kept > 0.95 and torch.equal(found.data, read_volume(whole, channels=3).data)


def multi_page(path: Path) -> Path:
    pages = [Image.fromarray(pixels() + i) for i in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    return path


def deep_colour(path: Path) -> Path:
    """A PNG of 3 x 16 bits: SimpleITK writes it, Pillow would read the upper 8 of each."""
    sitk.WriteImage(sitk.GetImageFromArray(pixels(3, np.uint16) * 600, isVector=True), str(path))
    return path


def filled(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


BAD = {
    "missing": (lambda d: d / "no.png", "no such file"),
    "empty": (lambda d: filled(d / "a.png", b""), "an unreadable file"),
    "text": (lambda d: filled(d / "a.tif", b"not an image" * 50), "an unreadable file"),
    "GIF": (lambda d: save(d / "a.png", palette(pixels()), format="GIF"), "an unreadable file"),
    "several pages": (lambda d: multi_page(d / "a.tif"), "3 images in one file; expected a single image"),
    "CMYK": (lambda d: save(d / "a.jpg", Image.fromarray(pixels(3)).convert("CMYK")), "colours of the kind CMYK"),
    "deep colour": (lambda d: deep_colour(d / "a.png"), "colours of 16 bits; expected 8 bits per colour"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, kind) -> None:
    maker, found = BAD[kind]
    path = maker(tmp_path)
    for reader in (lambda file: read_volume(file, channels=None), read_labels):
        with pytest.raises(InputError) as caught:
            reader(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: found ") and "\n" not in message
        assert found in message or (reader is read_labels and "a JPEG" in message)


def test_colour_and_greyscale_are_told_apart(tmp_path: Path) -> None:
    grey, colour = save(tmp_path / "grey.png"), save(tmp_path / "colour.png", pixels(3))
    with pytest.raises(InputError, match=r"found a greyscale image; expected a colour image; .*1 for data\.channels"):
        read_volume(grey, channels=3)
    with pytest.raises(InputError, match=r"found a colour image; expected a greyscale image; .*3 for data\.channels"):
        read_volume(colour, channels=1)
    with pytest.raises(InputError, match="found a colour image; expected a greyscale or palette image of class values"):
        read_labels(colour)
    assert len(read_map(grey).data) == 1 and len(read_map(colour).data) == 3


def test_a_jpeg_is_no_mask(tmp_path: Path) -> None:
    """Its values are not those that were saved: a mask of 0 and 1 comes back with others, or empty."""
    path = save(tmp_path / "mask.jpg", (pixels() > 10).astype(np.uint8))
    with pytest.raises(InputError, match=r"mask\.jpg: found a JPEG; expected a mask in a lossless format"):
        read_labels(path)


# ---- writing ---------------------------------------------------------------------------------------------------------

SCAN = Volume(torch.zeros(1, WIDTH, HEIGHT, 1), np.diag([-1.0, -1.0, 1.0, 1.0]), Path("scan.png"))


@settings(deadline=None, max_examples=40)
@given(
    labels=arrays.arrays(
        np.int64,
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(1)),
        elements=st.integers(0, 255) | st.integers(0, 65535),
    )
)
def test_masks_return_as_they_were_written(tmp_path_factory, labels) -> None:
    path = tmp_path_factory.getbasetemp() / "mask.png"
    like = Volume(torch.zeros(1, *labels.shape), SCAN.affine)
    write_labels(torch.from_numpy(labels), like, path)
    back = read_labels(path)
    np.testing.assert_array_equal(back.data[0].numpy(), labels)
    like.require_same_grid(back)
    with Image.open(path) as image:
        assert image.size == labels.shape[:2]
        assert image.mode == ("L" if labels.max() < 256 else "I;16")


@pytest.mark.parametrize("suffix", [s for s in IMAGE_SUFFIXES if s != ".png"])
def test_masks_are_written_into_no_other_image_format(tmp_path: Path, suffix) -> None:
    path = tmp_path / f"mask{suffix}"
    with pytest.raises(UsageError, match=rf"mask{suffix}: masks of images are written as \.png, never as {suffix}; "):
        write_labels(torch.zeros(WIDTH, HEIGHT, 1, dtype=torch.uint8), SCAN, path)
    assert not list(tmp_path.iterdir())


def test_maps_volumes_and_members_go_to_nifti(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(UsageError, match=r"a\.png: a PNG holds the mask of one image, not a map of real numbers; use"):
        write_map(torch.zeros(WIDTH, HEIGHT, 1), SCAN, path)
    with pytest.raises(UsageError, match=r"not labels of 7 x 5 x 1 x 2; use \.nii\.gz"):
        write_labels(torch.zeros(2, WIDTH, HEIGHT, 1, dtype=torch.uint8), SCAN, path)
    volume = Volume(torch.zeros(1, WIDTH, HEIGHT, 3), SCAN.affine)
    with pytest.raises(UsageError, match=r"not labels of 7 x 5 x 3; use \.nii\.gz"):
        write_labels(torch.zeros(WIDTH, HEIGHT, 3, dtype=torch.uint8), volume, path)
    slice_of_a_scan = Volume(torch.zeros(1, WIDTH, HEIGHT, 1), np.diag([0.9, 0.9, 3, 1]))
    with pytest.raises(MedsegError, match="cannot keep the scan's affine"):
        write_labels(torch.zeros(WIDTH, HEIGHT, 1, dtype=torch.uint8), slice_of_a_scan, path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_spares_what_was_there(tmp_path: Path, monkeypatch) -> None:
    path = filled(tmp_path / "mask.png", b"old")

    def half(target: Path, *_: object) -> None:
        target.write_bytes(b"half")

    monkeypatch.setattr(raster, "write", half)
    with pytest.raises(MedsegError, match="unreadable"):
        write_labels(torch.zeros(WIDTH, HEIGHT, 1, dtype=torch.uint8), SCAN, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- folders ---------------------------------------------------------------------------------------------------------


def found_in(folder: Path, *names: str) -> list[str]:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return [path.name for path in find_scans(folder)]


def test_images_are_scans_and_our_masks_maps_and_previews_are_not(tmp_path: Path) -> None:
    names = ("b.jpg", "a.png", "a_seg.png", "a_prob.nii.gz", "a_preview.png", "c.TIF", ".hidden.png", "notes.txt")
    assert found_in(tmp_path / "images", *names) == ["a.png", "b.jpg", "c.TIF"]
    with pytest.raises(InputError, match=r"a folder with only results \(2 files\)"):
        found_in(tmp_path / "results", "a_seg.png", "a_prob.nii.gz", "a_preview.png")


def test_images_beside_volumes_are_pictures_of_them(tmp_path: Path) -> None:
    """Screenshots and previews lay beside scans before images could be scans."""
    names = ("a.nii.gz", "a_seg.nii.gz", "a_preview.png", "montage.png", "b.nrrd")
    assert found_in(tmp_path / "scans", *names) == ["a.nii.gz", "b.nrrd"]


def test_a_collection_of_images_leaves_our_results_beside_them_out(tmp_path: Path) -> None:
    """Masks and previews would be learnt as images; what is only named like one is an image."""
    for name in ("a.png", "a_seg.png", "a_preview.png", "b.jpg", "b_seg.png", "c_seg.png"):
        save(tmp_path / name)
    collection = find_images(tmp_path)
    assert collection.kind == "images"
    assert [entry.name for entry in collection.entries] == ["a.png", "b.jpg", "c_seg.png"]


def test_scans_with_previews_stay_scans(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    save(tmp_path / "a_preview.png")
    collection = find_images(tmp_path)
    assert (collection.kind, [entry.name for entry in collection.entries]) == ("scans", ["a.nii.gz"])


def test_pictures_that_medseg_writes_are_no_images_wherever_they_lie(tmp_path: Path) -> None:
    """Previews in a folder of results, and the contact sheets among samples; elsewhere grid.png is an image."""
    for name in ("a_preview.png", "a_anomaly_preview.png", "grid.png", "b.png"):
        save(tmp_path / name)
    assert [entry.name for entry in find_images(tmp_path).entries] == ["b.png", "grid.png"]
    save(tmp_path / "reference.png")
    (tmp_path / "samples.json").write_text("{}")
    assert [entry.name for entry in find_images(tmp_path).entries] == ["b.png"]
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match="none of them an image"):
        find_images(tmp_path)


def test_every_suffix_has_a_reader_and_volumes_keep_theirs() -> None:
    assert set(SUFFIXES) == {*VOLUME_SUFFIXES, *IMAGE_SUFFIXES}
    assert set(VOLUME_SUFFIXES) == {".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"}
    assert is_image("a/b.PNG") and not is_image("a.png/b.nii.gz")


# ---- real images -----------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_real_images_and_masks_are_on_one_grid(data_folder: Path) -> None:
    images = sorted((data_folder / "nuclei_dsb2018" / "images").glob("[!.]*.png"))[::25]
    assert len(images) == 10
    for path in images:
        volume, mask = read_volume(path, channels=3), read_labels(data_folder / "nuclei_dsb2018" / "masks" / path.name)
        assert volume.data.shape == (3, 256, 256, 1)
        volume.require_same_grid(mask)
        assert torch.unique(mask.data).tolist() == [0, 1]
        np.testing.assert_array_equal(volume.data[:, :, :, 0].numpy(), np.asarray(Image.open(path)).transpose(2, 1, 0))
