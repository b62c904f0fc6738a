"""The scans that a user names: files, lists of files, folders, BIDS folders, DICOM folders, and files of channels."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg_diffusion.errors import InputError, UsageError, remark

from .inputs import of_unread_formats, refuse_lost, scan_files, unread_files
from .io import read_volume, stacked
from .modality import BIDS_SUFFIX, ModelInput, SeriesChoice
from .outputs import RESULTS, SEGMENTATION, is_output_file
from .paths import (
    SUFFIXES,
    UNREAD_SUFFIXES,
    VOLUME_SUFFIXES,
    folders_below,
    is_dicom,
    is_dicom_zip,
    is_dicomdir,
    is_image,
    is_series,
    require_file,
    scan_name,
)
from .volume import Volume

_LIST = ".txt"
_BIDS = "dataset_description.json"
_NUMBERED = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class InputOptions:
    """Options on what is read.

    Attributes:
        pattern: Glob of the scans, relative to each folder.
        channels: Name and file of each channel of one scan, instead of scans.
        series: The DICOM series: its number, the start of its UID, or a part of its description.
    """

    pattern: str | None = None
    channels: tuple[tuple[str, Path], ...] = ()
    series: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple((name, Path(path)) for name, path in self.channels))


@dataclass(frozen=True)
class Source:
    """A scan to read.

    Attributes:
        path: Its file, the folder of a DICOM series, or the file of its first channel.
        further_channels: The files of its other channels, in the model's order, if each channel has a file.
        name: Name of its results, without ending; empty for the name of the file.
        folder: Folder of its results, below the folder given with -o.
    """

    path: Path
    further_channels: tuple[Path, ...] = ()
    name: str = ""
    folder: Path = Path()

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of the scan, or one file for each channel."""
        return (self.path, *self.further_channels)

    @property
    def named(self) -> Path:
        """The path by which results are named."""
        if not self.name:
            return self.path
        return self.path.with_name(self.name + self.path.name[len(scan_name(self.path)) :])

    def output(self, output: Path | None) -> Path | None:
        """What -o is for this scan: a file, its own folder below the given one, or None (beside the scan)."""
        return output if output is None or is_output_file(output) else output / self.folder


def find_sources(paths: Sequence[Path], takes: ModelInput, options: InputOptions = InputOptions()) -> list[Source]:
    """The scans that a user names, each only once.

    A path is one of these:

    - the file of a scan, a DICOM folder or zip, or a DICOMDIR;
    - a list: a text file (.txt) with one path in each line, relative to the list's folder. Empty lines and lines that
      start with # do not count;
    - a BIDS folder (dataset_description.json): the images of its subjects (sub-*) of the model's kind, without
      derivatives;
    - another folder: the scans in it, and all DICOM studies below it, in folders or zips. With a pattern, the files and
      DICOM folders below it that match.

    Results of earlier runs, by their names, do not count, unless a path or a list names them. Results of scans from a
    list, a BIDS folder or a pattern lie in the same subfolders as the scans. Scans of a list that are not below the
    list's folder have their whole path as subfolder.

    If the model has several channels, files named CASE_0000, CASE_0001, ... are the channels of one scan named CASE. If
    it has one channel, CASE_0000 is a scan named CASE, unless another file of that case lies beside it.

    Args:
        paths: What the user named.
        takes: What the model takes.
        options: The options.

    Raises:
        UsageError: Options that contradict each other or have no effect, or unknown names of channels.
        InputError: A path that does not exist or is no scan, a folder without scans, or a pattern without a match.
    """
    if options.channels:
        if paths or options.pattern:
            raise UsageError("--channel names the files of one scan; leave SCAN and --pattern out")
        sources = [_of_channels(options.channels, takes)]
    else:
        left_out: list[Path] = []
        named = [source for path in map(Path, paths) for source in _sources(path, takes, options.pattern, left_out)]
        if unread := list(dict.fromkeys(left_out)):
            remark(f"left out {of_unread_formats(unread)}; convert them to NIfTI")
        sources = _cases(dict.fromkeys(named), len(takes.channels))
    if options.series is not None and not any(is_dicom(file) for source in sources for file in source.files):
        raise UsageError("--series chooses one of several DICOM series, but none of the scans is DICOM; leave it out")
    return sources


def _sources(
    path: Path, takes: ModelInput, pattern: str | None, left_out: list[Path], listed: bool = False
) -> list[Source]:
    """The scans of one path; ``left_out`` gets the files in formats that are not read."""
    if pattern is not None:
        return _matching(path, pattern, left_out)
    if not listed and path.suffix.lower() == _LIST and path.is_file() and not is_dicom(path):
        return _listed(path, takes, left_out)
    if is_dicomdir(path):
        return _folder(path.parent, left_out)
    if not path.is_dir():
        require_file(path)
        return [Source(path)]
    if (path / _BIDS).is_file() and any(path.glob("sub-*/")):
        return _bids(path, takes)
    return _folder(path, left_out)


# ---- lists, patterns and BIDS ----------------------------------------------------------------------------------------


def _listed(file: Path, takes: ModelInput, left_out: list[Path]) -> list[Source]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(file, "a list that is no UTF-8 text", "one path in each line", "save it as UTF-8") from error
    sources = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        try:
            listed_here = _sources(file.parent / line, takes, None, left_out, listed=True)
        except InputError as error:
            raise InputError(
                file, f"in line {number}, {line}: {error.found}", error.expected, "correct the line or remove it"
            ) from error
        sources += [replace(source, folder=_below(source.path, file.parent)) for source in listed_here]
    if not sources:
        raise InputError(file, "a list without paths", "one path in each line", "check the list")
    return sources


def _below(path: Path, folder: Path) -> Path:
    """The folder of a scan, relative to ``folder``; its whole path without the root if it lies elsewhere."""
    parent, base = Path(os.path.abspath(path)).parent, Path(os.path.abspath(folder))
    return parent.relative_to(base if parent.is_relative_to(base) else parent.anchor)


def _matching(folder: Path, pattern: str, left_out: list[Path]) -> list[Source]:
    if not folder.is_dir():
        if not folder.exists():
            require_file(folder)
        raise UsageError(f"{folder}: --pattern is for folders; leave it out to name a file")
    # A pattern that ends with a plain name would skip links to files that do not exist; one with a bracket does not.
    listing = f"{pattern[:-1]}[{pattern[-1]}]" if pattern[-1:].isalnum() else pattern
    try:
        matches = sorted(folder.glob(listing))
    except (ValueError, NotImplementedError, IndexError) as error:
        raise UsageError(
            f"--pattern {pattern}: expected a path relative to the folder, such as **/*_T1w.nii.gz"
        ) from error
    visible = [path for path in matches if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    refuse_lost(visible)
    paths = [
        path
        for path in visible
        if (is_series(path) if path.is_dir() else path.name.lower().endswith(SUFFIXES) or _is_dicom_file(path))
    ]
    unread = [path for path in visible if path.name.lower().endswith(UNREAD_SUFFIXES) and path not in paths]
    # A slice stands for its series.
    scans = [
        path.parent if path.suffix.lower() != ".zip" and path.is_file() and is_series(path.parent) else path
        for path in paths
        if not _is_result(path)
    ]
    if not scans and unread:
        found = f"no scan that matches {pattern}, but {of_unread_formats([path.name for path in unread])}"
        raise InputError(folder, found, "scans", "convert them to NIfTI")
    if not scans:
        found = f"only results ({len(paths)} files)" if paths else f"{len(visible)} files, but no scan"
        raise InputError(
            folder,
            f"{found if visible else 'nothing'} that matches {pattern}",
            "scans",
            "check the pattern: it is relative to the folder, and **/ stands for any subfolders",
        )
    left_out += unread
    return [Source(path, folder=path.parent.relative_to(folder) if path != folder else Path()) for path in scans]


def _is_dicom_file(path: Path) -> bool:
    return is_dicom_zip(path) if path.suffix.lower() == ".zip" else is_dicom(path)


def _is_result(path: Path) -> bool:
    return path.is_file() and (scan_name(path).endswith(RESULTS) or path.name.endswith(SEGMENTATION["preview"]))


def _bids(folder: Path, takes: ModelInput) -> list[Source]:
    """The images of the model's kind in a BIDS folder.

    Images of several channels belong together if their names differ in suffix (and contrast agent) alone. A channel
    that a subject lacks is named, so that reading it fails without stopping the others.
    """
    kinds = [kind for kind in takes.kinds if kind in BIDS_SUFFIX]
    if len(kinds) < len(takes.channels):
        raise UsageError(
            f"{folder}: a BIDS folder, but the model {takes} does not say which of its images it takes; "
            "name them with --pattern, for instance --pattern 'sub-*/**/*_T1w.nii.gz'"
        )
    channels = [_bids_images(folder, kind) for kind in kinds]
    if not any(channels):
        ending = f"*{'_ce-*' if kinds[0] == 'T1c' else ''}_{BIDS_SUFFIX[kinds[0]]}.nii.gz"
        raise InputError(
            folder,
            f"a BIDS folder without sub-*/**/anat/{ending}",
            f"{kinds[0]} images for the model {takes.model}",
            "name other images with --pattern",
        )
    sources = []
    for key in sorted(set().union(*channels)):
        lacking = [key.with_name(f"{key.name}_{BIDS_SUFFIX[kind]}.nii.gz") for kind in kinds]
        first, *others = [images.get(key, other) for images, other in zip(channels, lacking, strict=True)]
        sources.append(Source(first, tuple(others), folder=first.parent.relative_to(folder)))
    return sources


def _bids_images(folder: Path, kind: str) -> dict[Path, Path]:
    """Subject, session and all entities but the contrast agent, as a path without suffix -> file of this kind."""
    images = {}
    for within in ("sub-*/anat", "sub-*/ses-*/anat"):
        for path in folder.glob(f"{within}/sub-*_{BIDS_SUFFIX[kind]}.nii*"):
            name = scan_name(path).removesuffix(f"_{BIDS_SUFFIX[kind]}")
            if ("_ce-" in name) == (kind == "T1c"):
                images[path.with_name(re.sub("_ce-[^_]*", "", name))] = path
    refuse_lost(images.values())
    return dict(sorted(images.items()))


# ---- folders ---------------------------------------------------------------------------------------------------------


def _folder(folder: Path, left_out: list[Path]) -> list[Source]:
    """The scans directly in a folder, and all DICOM studies below it."""
    if is_series(folder):
        return [Source(folder)]
    files = scan_files(folder)
    scans = [Source(file) for file in files if not scan_name(file).endswith(RESULTS)]
    scans += _studies(folder)
    left_out += (unread := unread_files(folder))
    if not scans:
        found = f"a folder with only results ({len(files)} files)" if files else "a folder without scans"
        remedy = "check the path; --pattern '**/*.nii.gz' reads subfolders, too"
        if unread:
            found = f"no scan, but {of_unread_formats([path.name for path in unread])}"
            remedy = "convert them to NIfTI"
        raise InputError(folder, found, f"files that end with {', '.join(SUFFIXES)}, or DICOM", remedy)
    return scans


def series_below(folder: Path) -> list[Path]:
    """The DICOM series below a folder, of which `find_sources` reads one for each study, and the zips of series.

    The localizers of a study that has other series are left out.
    """
    from .dicom import holds_scan

    found = []
    for members in _by_study(folder):
        scans = [path for path in members if holds_scan(path)] if len(members) > 1 else members
        found += scans or members
    return found + _zips_below(folder, found)


def _studies(folder: Path) -> list[Source]:
    """The DICOM studies below a folder.

    Series of one study are one scan, of which one series is read, if a folder holds them and no other series. Otherwise
    each series is a scan. Each zip with DICOM is a scan. DICOM segmentations are results.
    """
    studies = _by_study(folder)
    series = [path for members in studies for path in members]
    paths = []
    for members in studies:
        common = Path(os.path.commonpath(members))
        inside = [path for path in series if path.is_relative_to(common)]
        paths += [common] if inside == members and common not in members else members
    paths += _zips_below(folder, series)
    return [Source(path, folder=path.parent.relative_to(folder) if path != folder else Path()) for path in paths]


def _zips_below(folder: Path, series: Sequence[Path]) -> list[Path]:
    """The zips with DICOM below a folder, without those that were unpacked: series lie in a folder of their name."""
    files = (path for inner in folders_below(folder) for path in sorted(inner.iterdir()))
    zips = (path for path in files if not path.name.startswith(".") and is_dicom_zip(path))
    return [path for path in zips if not any(one.is_relative_to(path.with_suffix("")) for one in series)]


def _by_study(folder: Path) -> list[list[Path]]:
    """The folders of DICOM series below a folder, those of each study together."""
    from .dicom import study_of

    studies: dict[str, list[Path]] = defaultdict(list)
    for path in filter(is_series, folders_below(folder)):
        studies[study_of(path) or str(path)].append(path)
    return list(studies.values())


# ---- channels --------------------------------------------------------------------------------------------------------


def _of_channels(channels: Sequence[tuple[str, Path]], takes: ModelInput) -> Source:
    names = {name.lower(): name for name in takes.channels}
    files: dict[str, Path] = {}
    for given, path in channels:
        name = names.get(given.lower())
        if name is None or name in files:
            wrong = "unknown" if name is None else "given twice"
            raise UsageError(f"--channel {given}: {wrong}; the model {takes.model} has {', '.join(takes.channels)}")
        require_file(path)
        files[name] = path
    if missing := [name for name in takes.channels if name not in files]:
        raise UsageError(
            f"--channel {missing[0]}=FILE is missing; the model has the channels {', '.join(takes.channels)}"
        )
    first, *others = (files[name] for name in takes.channels)
    return Source(first, tuple(others))


def _cases(sources: Iterable[Source], channels: int) -> list[Source]:
    """The scans by nnU-Net's names: CASE_0000, CASE_0001, ... are the channels of one scan, named CASE."""
    listings: dict[Path, dict[str, dict[int, Path]]] = {}
    cases: dict[Path, Source] = {}
    for source in sources:
        name, number = (source.path.name, -1) if source.path.is_dir() else _case_of(source.path)
        if number >= 0 and not source.further_channels and not is_image(source.path):
            folder = source.path.parent
            if folder not in listings:
                listings[folder] = _by_case(folder)
            beside = listings[folder][name]  # -1: a file named CASE without a number
            if channels == 1 and list(beside) == [0]:
                source = replace(source, name=name)
            elif channels > 1 and len(beside) > 1 and 0 in beside and -1 not in beside and max(beside) < channels:
                first, *others = (beside[i] for i in sorted(beside))
                source = replace(source, path=first, further_channels=tuple(others), name=name)
        cases.setdefault(source.path, source)
    return list(cases.values())


def _by_case(folder: Path) -> dict[str, dict[int, Path]]:
    """The files of a folder by case and number; -1 without a number."""
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in folder.iterdir():
        if path.name.lower().endswith(VOLUME_SUFFIXES):
            name, number = _case_of(path)
            cases[name][number] = path
    return cases


def _case_of(path: Path) -> tuple[str, int]:
    numbered = _NUMBERED.fullmatch(scan_name(path))
    return (numbered[1], int(numbered[2])) if numbered else (scan_name(path), -1)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_source(source: Source, takes: ModelInput, series: str | None = None, channels: int | None = None) -> Volume:
    """Read a scan, from one file or from one file for each channel.

    Args:
        source: The scan.
        takes: What the model takes. It decides which of several DICOM series is read.
        series: The DICOM series that is read instead (`SeriesChoice.named`).
        channels: Number of channels that a single file must have; None accepts any.

    Raises:
        InputError: An unusable file, files on different grids, or another number of files than channels.
    """
    files, kinds = source.files, takes.kinds
    if len(files) == 1:
        return read_volume(source.path, channels, SeriesChoice(series, kinds[0] if len(kinds) == 1 else None))
    if len(files) != len(kinds):
        raise InputError(
            source.path,
            f"{len(files)} files ({', '.join(path.name for path in files)})",
            f"one for each channel of the model {takes.model}: {', '.join(takes.channels)}",
            "add the missing ones, or name every file with --channel NAME=FILE",
        )
    choices = [SeriesChoice(series, kind) for kind in kinds]
    return stacked(read_volume(file, 1, choice) for file, choice in zip(files, choices, strict=True))
