"""Probe: a text of which only the salient spans are scored, whatever file or world it came from.

Says what a probe is and checks it. Does not read files (`read_probes`) and knows no tokenizer
(`encode_probe`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


class ProbeFormatError(ValueError):
    """A probe file is malformed; the message lists the lines as `path:line: reason`."""


@dataclass(frozen=True)
class Probe:
    """A text with the spans whose loss is taken.

    Args:
        text: the whole text.
        spans: character offsets (start, end) into `text`, half open, in order, without overlap.
        kind: what the probe is about: "updated", "new", "unchanged" or any name of the user's.
        source: where it came from, "file:line" for files.
        answers: other acceptable texts of the span.
        query: the text with `_X_` for the span, where the source has it.

    Raises:
        ValueError: there is no span, or a span is empty, blank, outside the text, or overlaps
            another.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    kind: str
    source: str
    answers: tuple[str, ...] = ()
    query: str | None = None

    def __post_init__(self) -> None:
        if not self.spans:
            raise ValueError("spans is empty: a probe needs at least one [start, end] to score")
        if not self.kind:
            raise ValueError("kind='' is empty: name what the probe is about, such as 'updated'")
        previous_end = 0
        for start, end in sorted(self.spans):
            shown = f"span [{start}, {end}]"
            if not 0 <= start <= len(self.text) or not 0 <= end <= len(self.text):
                raise ValueError(
                    f"{shown} lies outside the text of {len(self.text)} characters: offsets count "
                    "characters from 0"
                )
            if start >= end:
                raise ValueError(f"{shown} is empty: the end is the first character after the span")
            if not self.text[start:end].strip():
                raise ValueError(f"{shown} covers only spaces: nothing there to score")
            if start < previous_end:
                raise ValueError(
                    f"{shown} overlaps the span before it, which ends at {previous_end}"
                )
            previous_end = end
        object.__setattr__(self, "spans", tuple(sorted(self.spans)))

    @property
    def span_texts(self) -> tuple[str, ...]:
        """The text of each span."""
        return tuple(self.text[start:end] for start, end in self.spans)

    def with_answer(self, answer: str) -> Probe:
        """Give the same probe with its only span replaced by `answer`, to score other texts.

        Raises:
            ValueError: the probe has several spans, or `answer` is blank.
        """
        if len(self.spans) != 1:
            raise ValueError(
                f"{self.source}: {len(self.spans)} spans; only a probe with one span takes "
                "another answer"
            )
        start, end = self.spans[0]
        text, span = insert_answer(self.text[:start], answer, self.text[end:])
        return replace(self, text=text, spans=(span,), answers=())


def insert_answer(before: str, answer: str, after: str) -> tuple[str, tuple[int, int]]:
    """Put `answer` between two pieces of text as a careful typist would, and say where it lies.

    Spaces around the answer are dropped, as is a space before an answer that begins with closing
    punctuation (", born 1940"), and a full stop after an answer that ends with one ("Arsenal F.C.":
    two stops in a row would also share a token, half of which is not the answer).

    Returns:
        The text and the (start, end) of the answer in it.

    Raises:
        ValueError: the answer is blank.
    """
    answer = answer.strip()
    if not answer:
        raise ValueError("the answer is blank: there is nothing to score")
    if answer[0] in ",;:.!?)]" and before.endswith(" "):
        before = before.rstrip(" ")
    if answer.endswith(".") and after.startswith(".") and not after.startswith(".."):
        after = after[1:]
    return before + answer + after, (len(before), len(before) + len(answer))


def by_kind(probes: Iterable[Probe]) -> dict[str, list[Probe]]:
    """Group probes by kind, kinds in order of first appearance, probes in their own order."""
    groups: dict[str, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.kind, []).append(probe)
    return groups


def probe_texts(probes: Iterable[Probe]) -> list[str]:
    """The distinct texts of probes, in order: training text that states what the probes ask."""
    return list(dict.fromkeys(probe.text for probe in probes))
