"""Groups of cases by a column of a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_diffusion.data.strata import read_strata
from medseg_diffusion.errors import InputError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "sites.csv"
    path.write_text("age,case,site\n50,a, north\n60,b,south\n70,other,north\n")
    return path


def test_cases_are_joined_by_name(table: Path) -> None:
    assert read_strata(table, "site", ["b", "a"]) == {"b": "south", "a": "north"}
    assert read_strata(table, "site", ["a"], {"a": "p"}) == {"a": "north"}, "the column case is preferred"


def test_a_table_of_patients_is_joined_by_patient(table: Path) -> None:
    table.write_text("patient,sex\np,f\nq,m\n")
    assert read_strata(table, "sex", ["a", "b", "c"], {"a": "p", "b": "q", "c": "p"}) == {"a": "f", "b": "m", "c": "f"}
    with pytest.raises(InputError, match=r"no row for patient r; expected one row for each patient; add its sex"):
        read_strata(table, "sex", ["a"], {"a": "r"})


@pytest.mark.parametrize(
    ("column", "cases", "message"),
    [
        ("site", ["a", "x", "y"], "found no row for case x and 1 more"),
        ("scanner", ["a"], "found the columns age, case, site; expected a CSV file with the columns case and scanner"),
    ],
)
def test_what_is_missing_is_named(table: Path, column: str, cases: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_strata(table, column, cases)
    assert message in str(caught.value) and str(table) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,site\na,\n", "a row without site"),
        ("case,site\na,x\na,y\n", "case a twice"),
        ("", "the columns none"),
        ("patient,site\np,x\n", "the columns patient, site"),
    ],
)
def test_a_bad_table_is_one_line(table: Path, text: str, message: str) -> None:
    table.write_text(text)
    with pytest.raises(InputError, match=message):
        read_strata(table, "site", ["a"])


def test_a_table_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.csv: found no such file; .*; check the path"):
        read_strata(tmp_path / "no.csv", "site", ["a"], {"a": "p"})
