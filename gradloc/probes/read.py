"""Reads a probe file of any supported format, found out from its first line.

The formats have files of their own.
"""

from __future__ import annotations

import os

from gradloc.probes.ecbd import read_ecbd
from gradloc.probes.jsonl import first_row
from gradloc.probes.probe import Probe, ProbeFormatError
from gradloc.probes.spans import read_spans
from gradloc.probes.templama import KINDS, read_templama, templama_dates


def read_probes(
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    dates: tuple[str, str] | None = None,
) -> list[Probe]:
    """Read TempLAMA, ECBD (both shapes) or spans JSONL.

    Args:
        path: the file.
        kind: for ECBD and spans files, the kind of all probes (default: "new" for ECBD; what the
            lines say, or "probe", for spans). TempLAMA's kinds follow from the dates; there, `kind`
            keeps only the probes of that kind: "updated", "unchanged", "new", or "outdated".
        dates: the earlier and the later date; TempLAMA needs it, the other formats have no dates
            and ignore it.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines, an unknown format, or an empty file.
        ValueError: a TempLAMA file without `dates`, with dates that it does not have, or that gives
            no probe of the kind asked for.
    """
    row, source = first_row(path)
    if "query" in row and "answer" in row:
        return _read_templama(path, kind, dates)
    if "probe_sentences" in row or "masked_sentence" in row:
        return read_ecbd(path) if kind is None else read_ecbd(path, kind)
    if "text" in row and "spans" in row:
        return read_spans(path, kind)
    raise ProbeFormatError(
        f"{source}: fields {sorted(row)} are no known probe format; expected query, answer, date "
        "(TempLAMA), "
        "probe_sentences or masked_sentence (ECBD), or text, spans"
    )


def _read_templama(
    path: str | os.PathLike[str], kind: str | None, dates: tuple[str, str] | None
) -> list[Probe]:
    if dates is None:
        raise ValueError(
            f"{os.fspath(path)} is a TempLAMA file: name two of its dates to compare, of "
            f"{', '.join(templama_dates(path))}"
        )
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"kind={kind!r}: the kinds of a TempLAMA file follow from its dates; choose from "
            f"{', '.join(KINDS)}, "
            "or name none for updated, unchanged and new"
        )
    old_date, new_date = dates
    probes = read_templama(path, old_date, new_date, include_outdated=kind == "outdated")
    if kind is not None:
        probes = [probe for probe in probes if probe.kind == kind]
    if not probes:
        raise ValueError(
            f"{os.fspath(path)} gives no {kind or 'probes'} between {old_date} and {new_date}: "
            "choose other dates"
        )
    return probes
