"""Summaries in Markdown: a name cannot become markup, a link or a mention, and a table stays a table."""

from __future__ import annotations

import re

import pytest

from medseg_diffusion.reports.markdown import markdown_code, markdown_page, markdown_table, markdown_text
from medseg_diffusion.reports.page import Cell, Row, Table, number


@pytest.mark.parametrize(
    ("hostile", "expected"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("a|b", r"a\|b"),
        ("[x](http://evil.example)", "\\[x\\](http:\u2060//evil.example)"),
        ("@somebody #12", "@\u2060somebody #\u206012"),
        ("www.evil.example", "www\u2060.evil.example"),
        ("`code` *strong* _soft_ ~~gone~~", r"\`code\` \*strong\* \_soft\_ \~\~gone\~\~"),
        ("$x$", "&#36;x&#36;"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("two\n\n# lines", "two # lines"),
    ],
)
def test_a_name_reads_as_it_stands(hostile: str, expected: str) -> None:
    assert markdown_text(hostile) == expected


def test_a_table_has_as_many_cells_as_columns_whatever_the_names_are() -> None:
    rows = [Row([Cell("a|b\n|c"), number(0.5, note="0.4 to 0.6")], flags=["missed"]), Row([Cell("d"), number(None)])]
    lines = markdown_table(Table("Cases", ["Case", "Dice | x"], rows)).splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3] * 4
    assert lines[1] == "| --- | ---: |" and "0.500 (0.4 to 0.6)" in lines[2] and "(missed)" in lines[2]


def test_a_long_table_says_what_it_leaves_out() -> None:
    rows = [Row([Cell(f"case{i}")]) for i in range(60)]
    text = markdown_table(Table("Cases", ["Case"], rows))
    assert "case49" in text and "case50" not in text and text.endswith("10 more rows are in the page.")


def test_a_command_cannot_end_its_block() -> None:
    assert markdown_code("medseg ```\n</details> x") == "````\nmedseg ``` </details> x\n````"
    page = markdown_page("Title", ["One.", "Two."], ["| a |"], ["careful"], "medseg `x`")
    assert page.startswith("### Title\n\nOne. Two.\n\n| a |\n\n- careful\n\n<details>") and page.endswith(
        "</details>\n"
    )
