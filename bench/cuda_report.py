"""Makes report.md of what a GPU visit left in its folder, whatever of it is there.

Reads status.json, machine.txt, results.json and the logs of parts that failed; needs no torch and
measures nothing.

    python bench/cuda_report.py OUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_LOG_LINES = 15


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; {} where there is none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, its numbers to the right."""
    line = "| " + " | ".join(head) + " |"
    rule = "|" + "|".join("---" if at == 0 else "---:" for at in range(len(head))) + "|"
    return [line, rule, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: Any, form: str) -> str:
    """A number in the given form; empty for None."""
    return "" if value is None else format(value, form)


def parts(status: dict[str, Any], folder: Path) -> list[str]:
    """How each part ended, with the end of the log where it failed."""
    rows = [
        [p["name"], p["status"], f"{p['seconds']}", f"{p['limit_s']}", p["log"]]
        for p in status.get("parts", [])
    ]
    if not rows:
        return ["No part has ended.", ""]
    lines = table(["part", "status", "seconds", "limit", "log"], rows)
    for part in status["parts"]:
        path = folder / part["log"]
        if part["status"] != "passed" and path.exists():
            end = path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
            lines += [f"The end of {part['log']}:", "", "```", *end, "```", ""]
    return lines


def timings(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each model and dtype."""
    lines = []
    cases = dict.fromkeys((row["model"], row["dtype"]) for row in rows)
    for case in cases:
        mine = [row for row in rows if (row["model"], row["dtype"]) == case]
        first = mine[0]
        lines += [
            f"### {case[0]}, {case[1]}: {first['parameters'] / 1e6:,.0f} M parameters in "
            f"{first['tensors']} tensors",
            "",
        ]
        head = ["operation", "by", "moments", "active", "ms", "quartiles", "MB", "GB/s"]
        head += ["of a copy", "gradloc is x as fast", "launches", "copies", "host µs", "rounds"]
        predicted = any("predicted_ms" in row for row in mine)
        body = []
        for row in mine:
            low, high = row["quartiles_ms"]
            cells = [
                row["op"],
                row["by"],
                row["moments"],
                f"{row['active']:.1%}",
                f"{row['ms']:.3f}",
                f"{low:.3f}-{high:.3f}",
                f"{row['moved_bytes'] / 1e6:,.1f}",
                f"{row['gb_per_s']:,.0f}",
                number(row["of_copy"], ".1%"),
                number(row["gradloc_is_x_as_fast"], ".2f"),
                number(row.get("launches"), "d"),
                number(row.get("copies"), "d"),
                f"{row['host_us']:.0f}",
                str(row["rounds"]),
            ]
            body.append(cells + ([number(row.get("predicted_ms"), ".3f")] if predicted else []))
        lines += table(head + (["predicted ms"] if predicted else []), body)
    return lines


def host(rows: list[dict[str, Any]]) -> list[str]:
    """Host time of a step of many small tensors."""
    body = [
        [
            row["op"],
            row["by"],
            str(row["tensors"]),
            f"{row['host_us']:.1f}",
            f"{row['quartiles_us'][0]:.1f}-{row['quartiles_us'][1]:.1f}",
        ]
        for row in rows
    ]
    return table(["operation", "by", "tensors", "host µs", "quartiles"], body)


def report(folder: Path) -> str:
    """The whole page."""
    status, results = read_json(folder / "status.json"), read_json(folder / "results.json")
    rehearsal = status.get("rehearsal") or results.get("rehearsal")
    device = results.get("device", {}).get("name") or "no device measured"
    lines = [f"# gradloc on a GPU: {'rehearsal' if rehearsal else device}", ""]
    if rehearsal:
        lines += ["**rehearsal, no GPU: these are no measurements**", ""]
    lines += parts(status, folder)
    if not results:
        lines += ["There are no results: the benchmarks wrote none.", ""]
    else:
        machine = results["machine"]
        about = {**machine, **{f"device {k}": v for k, v in results["device"].items()}}
        lines += ["## Promises", "", *[f"* {line}" for line in results["bounds"]], ""]
        if results["failed"]:
            lines += ["## Failed", "", *[f"* {line}" for line in results["failed"]], ""]
        lines += ["## Times", "", f"How: {results['timing']}.", ""]
        lines += [*timings(results["rows"]), "## Host time", "", *host(results["host"])]
        if results["left_out"]:
            lines += ["## Left out", "", *[f"* {line}" for line in results["left_out"]], ""]
        lines += ["## Machine", "", *[f"* {key}: {value}" for key, value in about.items()], ""]
    return "\n".join(lines)


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python bench/cuda_report.py OUT_DIR, a folder that run_cuda.sh wrote")
        return 2
    folder = Path(sys.argv[1])
    (folder / "report.md").write_text(report(folder) + "\n")
    print(f"written to {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
