"""`medseg info` says what a report of a problem needs."""

from __future__ import annotations

import json

from tests.helpers.cli import medseg


def test_info_is_json() -> None:
    report = json.loads(medseg("info", "--json").stdout)
    assert report["versions"]["torch"] and "cpu" in report["devices"]
    assert "torch" in medseg("info").stdout
