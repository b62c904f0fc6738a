"""`make bench`: every benchmark of a claim, each in a process of its own, and a table of all of them.

    python benchmarks/run.py [--quick] [--out bench-output] [--only unet metrics] [--cpu-seconds] [--device cuda]

OUT/CLAIM.json has the numbers of a claim, OUT/table.md the table. A benchmark that fails or takes longer than its limit
does not stop the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common import end_at_sigterm, limited, table

CLAIMS = ("start", "unet", "samplers", "data", "segment", "metrics", "label_efficient", "anomaly", "scaling")
HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds of one benchmark")
    options = parser.parse_args()
    flags = ["--quick"] * options.quick + ["--cpu-seconds"] * options.cpu_seconds + ["--device", options.device]
    end_at_sigterm()
    failed: list[str] = []
    parts = []
    for claim in options.only:
        file = options.out / f"{claim}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / f"{claim}.py"), *flags, "--out", str(options.out)]
        how, status = limited(command, options.limit)
        if how != "done":
            reason = f"took more than {options.limit:g} s" if how == "stopped" else f"ended with {status}"
            print(f"{claim}: {reason}", file=sys.stderr)
            failed.append(claim)
            if not file.exists():
                continue
        content = json.loads(file.read_text())
        parts.append(f"## {claim}: {content['question']}\n\n{table(content['rows'])}\n")
    about = "Times and sizes are medians (smallest to largest). Above 1, ours is better.\n"
    text = "\n".join([about, *parts])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text(text)
    print(text)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
