"""Probes: texts of which only a salient span is scored.

Readers, tokenisation, an invented world and one in plain English; only `ask` runs a model.
"""

from gradloc.probes.ecbd import definitions, read_ecbd
from gradloc.probes.encode import encode_probe, even_batches, probe_batches
from gradloc.probes.english import EnglishWorld
from gradloc.probes.english_ask import ask
from gradloc.probes.english_deal import EnglishFact
from gradloc.probes.english_facts import FactKey, real_facts
from gradloc.probes.probe import Probe, ProbeFormatError, by_kind, probe_texts
from gradloc.probes.read import read_probes
from gradloc.probes.spans import read_spans, write_spans
from gradloc.probes.templama import read_templama, templama_dates
from gradloc.probes.world import TemporalWorld
from gradloc.probes.world_facts import Fact

__all__ = [
    "EnglishFact",
    "EnglishWorld",
    "Fact",
    "FactKey",
    "Probe",
    "ProbeFormatError",
    "TemporalWorld",
    "ask",
    "by_kind",
    "definitions",
    "encode_probe",
    "even_batches",
    "probe_batches",
    "probe_texts",
    "read_ecbd",
    "read_probes",
    "read_spans",
    "read_templama",
    "real_facts",
    "templama_dates",
    "write_spans",
]
