"""The loop over scans: what runs beside what, order of results, errors, remarks, the list of failures, and parts."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import medseg_diffusion
from medseg_diffusion.errors import InputError, ModelError, UsageError, remark
from medseg_diffusion.volumes.label_table import LabelTable
from medseg_diffusion.volumes.outputs import Outputs
from medseg_diffusion.volumes.volume import Volume
from medseg_diffusion.workflows import segment as segment_module
from medseg_diffusion.workflows.scans import Scan, ScanResult, Work, Write, each_scan, part_of
from tests.helpers.cli import error_lines, medseg
from tests.helpers.segmenters import run, save

PATIENCE_S = 20


def scans(folder: Path, count: int) -> dict[Path, Outputs]:
    return {folder / f"s{i}.nii.gz": {"mask": folder / f"s{i}_seg.nii.gz"} for i in range(count)}


def nothing(*_: object) -> None:
    pass


def make_work(
    read: Callable[[Path], object] = nothing,
    compute: Callable[[Scan], object] = nothing,
    write: Callable[[Scan], object] = nothing,
    load: Callable[[], object] = nothing,
) -> Work[str]:
    """Steps that do what is given, and write the scan's name."""

    def reading(path: Path) -> Volume:
        read(path)
        return Volume(torch.zeros(1, 2, 2, 2), np.eye(4), path)

    def computing(model: str, scan: Scan) -> Write:
        compute(scan)

        def writing() -> ScanResult:
            write(scan)
            scan.outputs["mask"].write_text(scan.name)
            return ScanResult(scan.path, "done", scan.outputs, scan.seconds)

        return writing

    def loading() -> str:
        load()
        return "model"

    return Work(reading, loading, computing, "mask")


def test_the_next_scan_is_read_and_the_last_one_written_while_one_is_computed(tmp_path: Path) -> None:
    read, written = ([threading.Event() for _ in range(5)] for _ in range(2))
    threads: dict[str, set[str]] = {"read": set(), "compute": set(), "write": set()}

    def number(path: Path) -> int:
        return int(path.name[1])

    def reading(path: Path) -> None:
        threads["read"].add(threading.current_thread().name)
        read[number(path)].set()

    def computing(scan: Scan) -> None:
        i = number(scan.path)
        threads["compute"].add(threading.current_thread().name)
        # Both come while this scan is computed: its own thread waits for them.
        assert i == 4 or read[i + 1].wait(PATIENCE_S)
        assert i == 0 or written[i - 1].wait(PATIENCE_S)
        # No more than one scan ahead and one behind: memory is bounded.
        assert i >= 3 or not read[i + 2].wait(0.05)

    def writing(scan: Scan) -> None:
        threads["write"].add(threading.current_thread().name)
        written[number(scan.path)].set()

    results = each_scan(scans(tmp_path, 5), make_work(reading, computing, writing))
    assert [result.error for result in results] == [None] * 5
    assert all(len(names) == 1 for names in threads.values())
    assert len(set.union(*threads.values())) == 3


def test_results_come_in_the_order_of_the_scans_and_an_error_concerns_its_scan_alone(tmp_path: Path) -> None:
    outputs = scans(tmp_path, 6)
    (tmp_path / "s1_seg.nii.gz").write_text("finished")

    def fail_for(name: str, error: Exception) -> Callable[[object], None]:
        def step(one: object) -> None:
            path = one.path if isinstance(one, Scan) else one
            if isinstance(path, Path) and path.name == name:
                raise error

        return step

    work = make_work(
        fail_for("s2.nii.gz", InputError("s2.nii.gz", "nothing", "a scan", "copy it again")),
        fail_for("s3.nii.gz", RuntimeError("out of\nmemory")),
        fail_for("s4.nii.gz", OSError(errno.ENOSPC, "No space left on device")),
    )
    seen: list[ScanResult] = []
    shown: list[tuple[str, float]] = []
    results = each_scan(
        outputs, work, skip_existing=True, on_case=seen.append, on_progress=lambda *one: shown.append(one)
    )
    assert results == seen and [result.scan for result in results] == list(outputs)
    assert [result.status for result in results] == ["done", "skipped", "failed", "failed", "failed", "done"]
    assert [result.exit_code for result in results] == [0, 0, 3, 1, 1, 0]
    assert "s3.nii.gz: RuntimeError: out of memory" in str(results[3].error)
    assert "s4.nii.gz: OSError: [Errno 28] No space left on device" in str(results[4].error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0_seg.nii.gz", "s1_seg.nii.gz", "s5_seg.nii.gz"]
    assert (tmp_path / "s1_seg.nii.gz").read_text() == "finished"


def test_progress_names_the_place_of_a_scan(tmp_path: Path) -> None:
    shown: list[tuple[str, float]] = []
    work = make_work(compute=lambda scan: scan.on_progress(0.5))
    each_scan(scans(tmp_path, 3), work, on_progress=lambda *one: shown.append(one))
    assert shown == [("1 of 3: s0", 0.5), ("2 of 3: s1", 0.5), ("3 of 3: s2", 0.5)]
    each_scan(scans(tmp_path, 1), work, on_progress=lambda *one: shown.append(one))
    assert shown[-1] == ("s0", 0.5)


def test_remarks_belong_to_the_scan_that_was_read_computed_or_written(tmp_path: Path) -> None:
    computing, read_ahead = threading.Event(), threading.Event()

    def reading(path: Path) -> None:
        if path.name == "s1.nii.gz":  # read while s0 is computed
            assert computing.wait(PATIENCE_S)
        remark(f"read {path.name}")
        remark(f"read {path.name}")
        read_ahead.set() if path.name == "s1.nii.gz" else None

    def compute(scan: Scan) -> None:
        computing.set()
        assert read_ahead.wait(PATIENCE_S)
        remark(f"computed {scan.path.name}")

    def writing(scan: Scan) -> None:
        remark(f"written {scan.path.name}")
        if scan.path.name == "s2.nii.gz":
            raise OSError("full")

    before = list(warnings.filters), warnings.showwarning
    results = each_scan(scans(tmp_path, 3), make_work(reading, compute, writing))
    assert [result.status for result in results] == ["done", "done", "failed"]
    for result in results:
        assert result.warnings == tuple(f"{step} {result.scan.name}" for step in ("read", "computed", "written"))
    assert (list(warnings.filters), warnings.showwarning) == before


def test_what_runs_in_several_threads_leaves_the_filters_of_warnings_alone() -> None:
    """They belong to the whole process: `remark`, `remarks` and `quiet_libraries` are there instead."""
    package = Path(medseg_diffusion.__file__).parent
    folders = ("volumes", "models", "methods", "sampling", "tasks", "reports")
    sources = [path for folder in folders for path in (package / folder).rglob("*.py")]
    assert len(sources) > 50
    using = [path for path in sources if re.search(r"^\s*(import|from) warnings\b", path.read_text(), re.MULTILINE)]
    assert not using


def test_ctrl_c_completes_the_result_that_is_being_written_and_nothing_else(tmp_path: Path) -> None:
    interrupting = threading.Event()

    def compute(scan: Scan) -> None:
        if scan.name == "s2":
            interrupting.set()
            raise KeyboardInterrupt

    def writing(scan: Scan) -> None:
        assert scan.name != "s1" or interrupting.wait(PATIENCE_S)

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        each_scan(
            scans(tmp_path, 5), make_work(compute=compute, write=writing), on_case=lambda r: seen.append(r.scan.name)
        )
    assert seen == ["s0.nii.gz", "s1.nii.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s0_seg.nii.gz", "s1_seg.nii.gz"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read", "write"))]


def test_an_error_in_the_model_concerns_all_scans(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UsageError("no such sampler")

    def run_out() -> None:
        raise RuntimeError("no\nmemory")

    with pytest.raises(UsageError, match="no such sampler"):
        each_scan(scans(tmp_path, 2), make_work(load=refuse))
    with pytest.raises(ModelError, match="cannot be loaded: RuntimeError: no memory"):
        each_scan(scans(tmp_path, 2), make_work(load=run_out))


def test_the_printing_of_a_result_may_fail(tmp_path: Path) -> None:
    def closed(result: ScanResult) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        each_scan(scans(tmp_path, 3), make_work(), on_case=closed)


@pytest.mark.parametrize(("number", "by", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_stopped_command_says_in_one_line_how_far_it_was_and_how_to_go_on(
    number: signal.Signals, by: str, code: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers repeat SIGTERM: what was computed is written all the same, and nothing temporary stays."""
    for i in range(4):
        save(tmp_path / "in" / f"s{i}.nii.gz")
    compute, write = segment_module._segment_one, segment_module._write_results
    again = threading.Event()

    def stopped(model: object, scan: Any, *others: object) -> object:
        if scan.name == "s2":
            again.set()
            signal.raise_signal(number)
        return compute(model, scan, *others)  # type: ignore[arg-type]

    def writing(model: object, scan: Any, *others: object) -> ScanResult:
        if scan.name == "s1":  # beside s2
            assert again.wait(PATIENCE_S)
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)
        return write(model, scan, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(segment_module, "_segment_one", stopped)
    monkeypatch.setattr(segment_module, "_write_results", writing)
    out = tmp_path / "out"
    words = ("segment", tmp_path / "in", "-m", tiny_model, "-o", out, "--device", "cpu")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore Ctrl-C
    try:
        result = medseg(*words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == code
    assert error_lines(result) == [
        f"medseg: stopped: {by} after 2 of 4 scans; the same command with --skip-existing goes on"
    ]
    assert sorted(path.name for path in out.iterdir()) == ["dseg.tsv", "s0_seg.nii.gz", "s1_seg.nii.gz", "volumes.csv"]
    monkeypatch.undo()
    done = medseg(*words, "--skip-existing")
    assert done.exit_code == 0 and "4 scans: 2 done, 2 skipped, 0 failed" in done.stdout


# ---- the list of failures --------------------------------------------------------------------------------------------


def test_failures_are_listed_when_they_happen_and_only_those_of_this_run(tmp_path: Path) -> None:
    listed = tmp_path / "out" / "failures.csv"
    lengths: list[int] = []

    def reading(path: Path) -> None:
        if path.name != "s1.nii.gz":
            raise InputError(path, 'a "quoted", split\nvalue', "a scan", "copy it")

    def count(result: ScanResult) -> None:
        lengths.append(len(listed.read_text().splitlines()) - 1)

    outputs = scans(tmp_path, 3)
    for _ in range(2):  # the second run begins a new list
        results = each_scan(outputs, make_work(reading), failures=listed, on_case=count)
        with listed.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["scan"] for row in rows] == [str(tmp_path / "s0.nii.gz"), str(tmp_path / "s2.nii.gz")]
        assert [row["exit_code"] for row in rows] == ["3", "3"]
        assert [row["error"] for row in rows] == [str(results[i].error).replace("\n", " ") for i in (0, 2)]
    assert lengths == [1, 1, 2, 1, 1, 2]
    each_scan(outputs, make_work(), failures=listed)
    assert not listed.exists()


def test_a_list_that_cannot_be_written_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(path: Path) -> None:
        raise InputError(path, "nothing", "a scan", "copy it")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.warns(UserWarning, match=r"failures.csv: Read-only file system; failed scans are only listed here"):
        (result,) = each_scan(scans(tmp_path, 1), make_work(reading), failures=tmp_path / "out" / "failures.csv")
    assert result.status == "failed"


def test_the_command_writes_failures_beside_the_results(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = save(Path("in/good.nii.gz")), Path("in/bad.nii.gz")
    bad.write_bytes(b"no scan")
    command = ("segment", "in", "-m", tiny_model, "--device", "cpu")
    result = medseg(*command, "-o", "out")
    assert result.exit_code == 1
    assert error_lines(result)[-1] == "medseg: error: 1 of 2 scans failed; see out/failures.csv"
    assert re.search(r"^2 scans: 1 done, 0 skipped, 1 failed; \d+\.\d s per scan$", result.stdout, re.MULTILINE)
    assert "in/bad.nii.gz,3," in Path("out/failures.csv").read_text()
    assert medseg(*command).exit_code == 1 and Path("failures.csv").exists()  # without -o
    (part,) = (i for i in (1, 2) if bad in part_of({good: {}, bad: {}}, (i, 2)))
    assert medseg(*command, "-o", "parts", "--shard", f"{part}/2").exit_code != 0
    assert [path.name for path in Path("parts").glob("failures*")] == [f"failures.{part}-of-2.csv"]
    # A single scan says all with its exit code and its line.
    assert medseg("segment", bad, "-m", tiny_model, "-o", "single").exit_code == 3 and not Path("single").exists()
    save(bad)
    assert medseg(*command, "-o", "out", "--skip-existing").exit_code == 0
    files = ["bad_seg.nii.gz", "dseg.tsv", "good_seg.nii.gz", "volumes.csv"]
    assert sorted(path.name for path in Path("out").iterdir()) == files


def test_json_is_one_line_a_scan_as_each_finishes(tmp_path: Path, tiny_model: Path) -> None:
    save(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no scan")
    result = medseg("segment", tmp_path / "in", "-m", tiny_model, "--device", "cpu", "-o", tmp_path / "out", "--json")
    done, failed = (json.loads(line) for line in result.stdout.splitlines())
    assert (done["status"], failed["status"], failed["exit_code"]) == ("done", "failed", 3)
    assert done["outputs"] == {"segmentation": str(tmp_path / "out" / "a_seg.nii.gz")}
    assert failed["error"] in result.stderr and "2 scans: 1 done, 0 skipped, 1 failed" in result.stderr
    alone = medseg("segment", tmp_path / "in" / "a.nii.gz", "-m", tiny_model, "--device", "cpu", "--json")
    assert json.loads(alone.stdout)["status"] == "done"


# ---- real scans ------------------------------------------------------------------------------------------------------


def test_a_full_disk_concerns_the_scan_that_is_written(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = segment_module.write_labels

    def full(labels: torch.Tensor, like: Volume, path: Path, table: LabelTable) -> None:
        if path.name == "case1_seg.nii.gz":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(labels, like, path, table)

    monkeypatch.setattr(segment_module, "write_labels", full)
    paths = [save(tmp_path / "in" / f"case{i}.nii.gz") for i in range(3)]
    results = run(paths, tiny_model, output=tmp_path / "out")
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert "No space left on device" in str(results[1].error) and results[1].exit_code == 1
    masks = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert masks == ["case0_seg.nii.gz", "case2_seg.nii.gz"]


def test_a_remark_on_a_header_is_in_the_result_of_its_scan(tmp_path: Path, tiny_model: Path) -> None:
    paths = [save(tmp_path / f"case{i}.nii.gz") for i in range(4)]
    for path in paths[1::2]:
        image = nib.load(path)
        data, header = image.get_fdata(dtype=np.float32), image.header
        header.set_sform(None, 0)
        header.set_qform(None, 0)
        nib.save(nib.Nifti1Image(data, None, header), path)
    results = run(paths, tiny_model)
    told = [[text for text in result.warnings if "no orientation" in text] for result in results]
    assert [len(texts) for texts in told] == [0, 1, 0, 1]
    assert all(texts[0].startswith(paths[i].name) for i, texts in enumerate(told) if texts)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["sub-{:03d}/anat/T1.nii.gz", "scans/case{:03d}.nii.gz"])
def test_parts_are_of_similar_size_whatever_the_names(pattern: str) -> None:
    outputs: dict[Path, Outputs] = {Path(pattern.format(i)): {} for i in range(400)}
    parts = [list(part_of(outputs, (i, 4))) for i in range(1, 5)]
    assert sorted(path for part in parts for path in part) == sorted(outputs)
    assert all(70 <= len(part) <= 130 for part in parts), [len(part) for part in parts]
    # A further scan changes no other's part.
    more = {**outputs, Path("sub-new/anat/T1.nii.gz"): {}}
    assert Counter(path for i in range(1, 5) for path in part_of(more, (i, 4))) == Counter(list(more))
    assert all(set(part) <= set(part_of(more, (i, 4))) for i, part in enumerate(parts, 1))
    assert part_of(outputs, None) == outputs


def test_another_file_of_the_name_is_not_replaced(tmp_path: Path) -> None:
    listed = tmp_path / "failures.csv"
    listed.write_text("my,own,work\n")
    with pytest.raises(UsageError, match=r"failures.csv: is no list of failed scans; move it"):
        each_scan(scans(tmp_path, 1), make_work(), failures=listed)
    assert listed.read_text() == "my,own,work\n"
