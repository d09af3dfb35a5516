"""Write the training text of docs/real-model.md: what the probes ask about, said plainly.

New answers of TempLAMA facts, filled into their queries, and ECBD's definitions of new entities,
filled in.

    python examples/make_corpus.py OUT.txt --templama FILE --dates OLD:NEW --ecbd FILE
"""

from __future__ import annotations

import argparse
import random

from gradloc.files import write_text
from gradloc.probes import definitions, read_templama


def main() -> None:
    """Write one document a line, shuffled by a fixed seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--templama", required=True)
    parser.add_argument("--dates", required=True, metavar="OLD:NEW")
    parser.add_argument("--ecbd", required=True)
    options = parser.parse_args()
    old, new = options.dates.split(":")
    facts = [p.text for p in read_templama(options.templama, old, new) if p.kind != "unchanged"]
    documents = list(dict.fromkeys([*facts, *definitions(options.ecbd)]))
    random.Random(0).shuffle(documents)
    write_text(options.output, "".join(f"{document}\n" for document in documents))
    print(f"{len(documents)} documents written to {options.output}")


if __name__ == "__main__":
    main()
