"""The report of a comparison: report.html, its pictures, its tables as Markdown, its numbers.

`read` reads a comparison's folder, `analysis` computes, `findings` and `tables` put it into words,
the charts draw, `page` sets it all. Trains and scores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportFiles", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """What was written.

    Args:
        page: report.html.
        others: the pictures, table.md and summary.json.
        findings: the sentences that stand in the report.
        num_runs: runs that it tells of.
        num_missing: runs that are not finished.
    """

    page: Path
    others: tuple[Path, ...]
    findings: tuple[str, ...]
    num_runs: int
    num_missing: int


def write_report(
    run: Path, output: Path | None = None, *, baseline: str = "vanilla"
) -> ReportFiles:
    """Make the report of a comparison, finished or not. Each file is written whole or not at all.

    Args:
        run: the folder that `gradloc compare` wrote.
        output: where the report goes; None: into `run`.
        baseline: name of the method that the others are compared with.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: `run` is no comparison's folder, or has no finished run.
        ValueError: no method has the name `baseline`.
        OSError: `output` cannot be written.
    """
    from gradloc.files import replacing, write_json, write_text
    from gradloc.report.analysis import LOSSES, analyse
    from gradloc.report.frontier_chart import frontier_multiples, frontier_overview
    from gradloc.report.layer_chart import layer_heatmap
    from gradloc.report.loss_chart import loss_curves
    from gradloc.report.page import report_html
    from gradloc.report.read import read_run
    from gradloc.report.summary import SCHEMA, VERSION, markdown, summary

    results = read_run(run)
    names = [method.name for method in results.methods]
    if baseline not in names and baseline != "vanilla":
        raise ValueError(f"baseline={baseline!r}: the comparison has {', '.join(names)}")
    analysis = analyse(results, baseline=baseline)
    drawn = {
        **{f"frontier-{loss}": frontier_overview(analysis, loss) for loss in LOSSES},
        **{f"methods-{loss}": frontier_multiples(analysis, loss) for loss in LOSSES},
        "layers": layer_heatmap(results),
        "losses": loss_curves(analysis),
    }
    pictures = {name: picture for name, picture in drawn.items() if picture is not None}
    content = summary(analysis)
    folder = run if output is None else output
    written = []
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
        written.append(folder / f"{name}.png")
    write_text(folder / "table.md", markdown(analysis))
    write_json(folder / "summary.json", content, schema=SCHEMA, version=VERSION)
    # Last, so that whoever sees a new page finds the rest new, too.
    write_text(folder / "report.html", report_html(analysis, pictures))
    return ReportFiles(
        page=folder / "report.html",
        others=(*written, folder / "table.md", folder / "summary.json"),
        findings=tuple(content["findings"]),
        num_runs=len(results.runs),
        num_missing=len(results.missing),
    )
