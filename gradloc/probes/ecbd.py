"""Reads Entity Cloze by Date (Onoe et al., NAACL Findings 2022), in both shapes that go round.

The shape of the original release (`masked_sentence`, `answer_d`) and that of Onoe et al. (ACL 2023)
(`probe_sentences`, with the answer between `<extra_id_0>` and `<extra_id_1>`). Decides nothing
about dates: the files are split by date already.
"""

from __future__ import annotations

import os
import re
from typing import Any

from gradloc.probes.jsonl import parse_lines, text_field
from gradloc.probes.probe import Probe, insert_answer

_MASK = re.compile(r"<extra_id_\d+>")


def read_ecbd(path: str | os.PathLike[str], kind: str = "new") -> list[Probe]:
    """Read the cloze sentences, filled in; the span is what was masked.

    Args:
        path: the file, of either shape.
        kind: the kind of all its probes: "new" for entities that appeared after the model's
            training, another name ("popular") for a control file.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines or an empty file.
    """

    def parse(row: dict[str, Any], source: str) -> list[Probe]:
        return [
            Probe(text=text, spans=spans, kind=kind, source=source)
            for text, spans in _sentences(row)
        ]

    return [probe for probes in parse_lines(path, parse) for probe in probes]


def definitions(path: str | os.PathLike[str]) -> list[str]:
    """The first sentence about each entity, filled in: text that introduces it, to train on.

    Empty brackets and stray separators, left where the source dropped a pronunciation ("Hanoi ( or
    ; ) is"), are removed. An entity with several probes gives its sentence once.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines, an empty file, or the shape without definitions.
    """
    return list(dict.fromkeys(parse_lines(path, lambda row, _: _definition(row))))


def defined_probes(path: str | os.PathLike[str], kind: str = "new") -> dict[str, list[Probe]]:
    """Each entity's first sentence, as `definitions` gives it, with the probes of that entity.

    To train on the sentences of some entities and to ask about the same ones.

    Raises:
        FileNotFoundError: no such file.
        ProbeFormatError: malformed lines, an empty file, or the shape without definitions.
    """

    def parse(row: dict[str, Any], source: str) -> tuple[str, list[Probe]]:
        probes = [Probe(filled, spans, kind, source) for filled, spans in _sentences(row)]
        return _definition(row), probes

    found: dict[str, list[Probe]] = {}
    for text, probes in parse_lines(path, parse):
        found.setdefault(text, []).extend(probes)
    return found


def _definition(row: dict[str, Any]) -> str:
    if "definition" not in row:
        raise ValueError(
            "field 'definition' is missing: only the shape with 'probe_sentences' has it"
        )
    target = text_field(row, "def_target")
    text, _ = _fill(text_field(row, "definition"), _labels(target))
    return _tidy(text)


def _sentences(row: dict[str, Any]) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    if "masked_sentence" in row:
        answers = row.get("answer_d")
        if not isinstance(answers, dict) or not all(
            isinstance(text, str) for text in answers.values()
        ):
            raise ValueError("field 'answer_d' is not an object of mask -> answer")
        return [_fill(text_field(row, "masked_sentence"), answers)]
    templates = row.get("probe_sentences")
    if not isinstance(templates, dict) or not templates:
        raise ValueError(
            "neither 'masked_sentence' nor a filled 'probe_sentences': not an ECBD line"
        )
    found = []
    for name, template in templates.items():
        if not isinstance(template, dict):
            raise ValueError(f"probe_sentences[{name!r}] is not an object")
        labels = _labels(text_field(template, "label"))
        found.append(_fill(text_field(template, "probe_sentence"), labels))
    return found


def _labels(target: str) -> dict[str, str]:
    """Split "<extra_id_0> answer <extra_id_1>" into {mask: answer}."""
    masks = _MASK.findall(target)
    pieces = _MASK.split(target)
    if not masks or pieces[0].strip():
        raise ValueError(f"{target!r:.60} does not begin with <extra_id_0>")
    # The last mask only closes the answer before it.
    return {mask: piece for mask, piece in zip(masks, pieces[1:], strict=True) if piece.strip()}


def _fill(sentence: str, answers: dict[str, str]) -> tuple[str, tuple[tuple[int, int], ...]]:
    masks = _MASK.findall(sentence)
    if not masks:
        raise ValueError(f"no <extra_id_0> in {sentence!r:.80}")
    pieces = _MASK.split(sentence)
    text, spans = pieces[0], []
    for mask, after in zip(masks, pieces[1:], strict=True):
        if mask not in answers:
            raise ValueError(f"no answer for {mask}")
        text, span = insert_answer(text, answers[mask], after)
        spans.append(span)
    return text, tuple(spans)


def _tidy(text: str) -> str:
    text = re.sub(r"\(\s*(?:(?:or|;|,)\s*)*\)", "", text)
    text = re.sub(r"\(\s*(?:(?:or\s+)?[;,]\s*)*", "(", text)
    text = re.sub(r"\s+([.,;:!?)])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()
