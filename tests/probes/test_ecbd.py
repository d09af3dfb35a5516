"""ECBD: both shapes filled in, the span in the right place; definitions as training text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradloc.probes import ProbeFormatError, definitions, read_ecbd, read_probes


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def cloze(sentence: str, label: str, **more: Any) -> dict[str, Any]:
    template = {"probe_sentence": sentence, "label": label}
    return {"probe_sentences": {"template_0": template}, **more}


@pytest.mark.parametrize(
    ("sentence", "label", "text", "span"),
    [
        ("It ran on <extra_id_0>, then.", "a Mac", "It ran on a Mac, then.", "a Mac"),
        ("It weighs <extra_id_0> now.", "80\u00a0mi", "It weighs 80\u00a0mi now.", "80\u00a0mi"),
        ("<extra_id_0> is here", "Þórhildur", "Þórhildur is here", "Þórhildur"),
        ("They play as <extra_id_0>.", "F.C.", "They play as F.C.", "F.C."),
        ("of <extra_id_0> It also", "N501Y. ", "of N501Y. It also", "N501Y."),
        ("group Q<extra_id_0> (Q1a)", "1a", "group Q1a (Q1a)", "1a"),
        ("Ingrid <extra_id_0>) is", ", born 1940", "Ingrid, born 1940) is", ", born 1940"),
    ],
)
def test_both_shapes_give_the_same(
    tmp_path: Path, sentence: str, label: str, text: str, span: str
) -> None:
    first = write(tmp_path / "a", cloze(sentence, f"<extra_id_0> {label} <extra_id_1>"))
    second = write(
        tmp_path / "b", {"masked_sentence": sentence, "answer_d": {"<extra_id_0>": label}}
    )
    for path in (first, second):
        (probe,) = read_ecbd(path)
        assert probe.text == text
        assert probe.span_texts == (span,)
        assert (probe.kind, probe.source) == ("new", f"{path}:1")


def test_several_masks_and_several_templates(tmp_path: Path) -> None:
    row = cloze(
        "The <extra_id_0> of <extra_id_1>.", "<extra_id_0> king <extra_id_1> Mars <extra_id_2>"
    )
    row["probe_sentences"]["template_1"] = {
        "probe_sentence": "Mars has a <extra_id_0>",
        "label": "<extra_id_0> king <extra_id_1>",
    }
    probes = read_ecbd(write(tmp_path / "a", row), kind="popular")
    assert [(p.text, p.span_texts, p.kind) for p in probes] == [
        ("The king of Mars.", ("king", "Mars"), "popular"),
        ("Mars has a king", ("king",), "popular"),
    ]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (cloze("no mask", "<extra_id_0> x <extra_id_1>"), "no <extra_id_0> in"),
        (cloze("a <extra_id_0>", "x"), "does not begin with <extra_id_0>"),
        (cloze("a <extra_id_0>", "<extra_id_0>  <extra_id_1>"), "no answer for <extra_id_0>"),
        (cloze("a <extra_id_1>", "<extra_id_0> x <extra_id_1>"), "no answer for <extra_id_1>"),
        ({"probe_sentences": {"t": {"label": "<extra_id_0> x"}}}, "'probe_sentence' is missing"),
        ({"probe_sentences": {}}, "not an ECBD line"),
        ({"masked_sentence": "a <extra_id_0>"}, "'answer_d' is not an object"),
        ({"masked_sentence": "a <extra_id_0>", "answer_d": {"<extra_id_0>": ""}}, "blank"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path: Path, bad: Any, reason: str) -> None:
    path = write(tmp_path / "a", cloze("a <extra_id_0>", "<extra_id_0> b <extra_id_1>"), {}, bad)
    with pytest.raises(ProbeFormatError, match=reason) as caught:
        read_ecbd(path)
    assert f"{path}:2: " in str(caught.value)
    assert f"{path}:3: " in str(caught.value)


def test_definitions_read_as_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a",
        {"definition": "Hanoi ( or ; ) is a <extra_id_0>.", "def_target": "<extra_id_0> city <>"},
        {
            "definition": "Eid <extra_id_0> (; born 1940) <extra_id_1> feast .",
            "def_target": "<extra_id_0> al-Fitr <extra_id_1>  is  a <extra_id_2>",
        },
        {"definition": "Hanoi () is a <extra_id_0>.", "def_target": "<extra_id_0> city <>"},
        {"definition": 'Kurz ( or ; , "K") is <extra_id_0>.', "def_target": "<extra_id_0> on <>"},
    )
    path.write_text(path.read_text().replace("<>", "<extra_id_1>"))
    assert definitions(path) == [
        "Hanoi is a city.",
        "Eid al-Fitr (born 1940) is a feast.",
        'Kurz ("K") is on.',
    ]


def test_the_shape_without_definitions_says_so(tmp_path: Path) -> None:
    row = {"masked_sentence": "a <extra_id_0>", "answer_d": {"<extra_id_0>": "b"}}
    with pytest.raises(ProbeFormatError, match="'definition' is missing"):
        definitions(write(tmp_path / "a", row))


def test_read_probes_knows_both_shapes(tmp_path: Path) -> None:
    row = {"masked_sentence": "a <extra_id_0>", "answer_d": {"<extra_id_0>": "b"}}
    path = write(tmp_path / "a", row)
    assert read_probes(path)[0].kind == "new"
    assert read_probes(path, kind="popular", dates=("1", "2"))[0].kind == "popular"
    path = write(tmp_path / "b", cloze("a <extra_id_0>", "<extra_id_0> b <extra_id_1>"))
    assert read_probes(path)[0].span_texts == ("b",)
