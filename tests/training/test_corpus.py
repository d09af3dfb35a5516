import gc
import json
import os
import tempfile

import pytest

from gradloc.training.corpus import pack_corpus, packed_corpus, text_batches

LINES = ["The river sees the stone.", "", "Élzéa 🙂 is old.", "   ", "One", "two three"]
TEXTS = [line for line in LINES if line.strip()]


def expected_stream(tokenizer, texts):
    stream = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return stream


def write_rows(path, texts, field="text"):
    if path.suffix == ".txt":
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_dict({field: texts}).to_parquet(str(path))
    else:
        rows = [{"id": number, field: text} for number, text in enumerate(texts)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("block_size", [2, 5, 13])
def test_blocks_are_the_whole_stream_but_for_the_last_part(
    tokenizer, tmp_path, suffix, block_size, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "unused")
    path = write_rows(tmp_path / f"corpus{suffix}", LINES)
    stream = expected_stream(tokenizer, TEXTS)
    corpus = pack_corpus(path, tokenizer, block_size=block_size)
    flat = [token for row in corpus.dataset for token in row["input_ids"]]
    assert flat == stream[: len(flat)]
    assert all(len(row["input_ids"]) == block_size for row in corpus.dataset)
    assert [row["labels"] for row in corpus.dataset] == corpus.dataset["input_ids"][:]
    assert corpus.num_tokens == len(flat)
    assert corpus.num_dropped_tokens == len(stream) - len(flat) < block_size
    assert corpus.num_documents == len(TEXTS)
    assert not (tmp_path / "unused").exists(), "something was left in the cache of datasets"


def test_files_follow_one_another_across_file_and_batch_borders(tokenizer, tmp_path):
    many = [f"line {number}" for number in range(2345)]  # more than two batches of rows
    first = write_rows(tmp_path / "a.jsonl", ["alpha", "beta"])
    second = write_rows(tmp_path / "b.txt", many)
    dataset = packed_corpus([second, first], tokenizer, block_size=7)
    stream = expected_stream(tokenizer, [*many, "alpha", "beta"])
    flat = [token for row in dataset for token in row["input_ids"]]
    assert flat == stream[: len(stream) // 7 * 7]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("line", ["one", "two", "three"]),
        ("paragraph", ["one\ntwo", "three\n"]),
        ("file", ["one\ntwo\n\nthree\n"]),
    ],
)
def test_what_a_document_of_a_text_file_is(tokenizer, tmp_path, documents, expected):
    path = tmp_path / "corpus.txt"
    path.write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    corpus = pack_corpus(path, tokenizer, block_size=2, documents=documents)
    flat = [token for row in corpus.dataset for token in row["input_ids"]]
    stream = expected_stream(tokenizer, expected)
    assert flat == stream[: len(flat)]
    assert corpus.num_documents == len(expected)
    assert len(stream) - len(flat) == corpus.num_dropped_tokens < 2


def test_another_text_field(tokenizer, tmp_path):
    path = write_rows(tmp_path / "c.jsonl", ["alpha beta"], field="body")
    dataset = packed_corpus(path, tokenizer, block_size=2, text_field="body")
    assert dataset[0]["input_ids"] == tokenizer("alpha beta")["input_ids"][:2]


def test_a_tokenizer_that_ends_documents_itself_gets_no_second_eos(tokenizer, tmp_path):
    class Ending:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, texts, **options):
            ids = tokenizer(texts, **options)["input_ids"]
            return {"input_ids": [[*one, self.eos_token_id] for one in ids]}

    path = write_rows(tmp_path / "c.txt", TEXTS)
    flat = [t for row in packed_corpus(path, Ending(), block_size=2) for t in row["input_ids"]]
    assert flat == expected_stream(tokenizer, TEXTS)[: len(flat)]


def test_the_files_go_away_with_the_dataset(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write_rows(tmp_path / "c.txt", TEXTS)
    dataset = packed_corpus(path, tokenizer, block_size=2)
    assert os.listdir(tmp_path / "temporary")
    del dataset
    gc.collect()
    assert os.listdir(tmp_path / "temporary") == []


def test_a_cache_folder_that_is_given_stays(tokenizer, tmp_path):
    path = write_rows(tmp_path / "c.txt", TEXTS)
    dataset = packed_corpus(path, tokenizer, block_size=2, cache_dir=tmp_path / "cache")
    rows = dataset["input_ids"][:]
    del dataset
    gc.collect()
    from datasets import Dataset

    (arrow,) = (tmp_path / "cache").glob("packed-*.arrow")
    assert Dataset.from_file(str(arrow))["input_ids"][:] == rows


def test_text_batches_are_the_first_blocks(tokenizer, text_file):
    rows = packed_corpus(text_file, tokenizer, block_size=8)["input_ids"][:]
    batches = text_batches(text_file, tokenizer, block_size=8, batch_size=3, max_batches=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [rows[:3], rows[3:6]]
    for batch in batches:
        assert batch["labels"].tolist() == batch["input_ids"].tolist()
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
        assert batch["attention_mask"].min() == 1
    every = text_batches(text_file, tokenizer, block_size=8, batch_size=3)
    assert [row for batch in every for row in batch["input_ids"].tolist()] == rows


CASES = {
    "missing": (None, "no such corpus file", FileNotFoundError),
    "empty.txt": ("", "is empty", ValueError),
    "blank.txt": (" \n\n  \n", "holds no text", ValueError),
    "short.txt": ("a", "fewer than one block of block_size=64", ValueError),
    "strange.doc": ("text", "unknown suffix '.doc'", ValueError),
    "bad.jsonl": ('{"text": "a"}\n{"text": oops}\n', r"bad.jsonl:2: Expecting value", ValueError),
    "list.jsonl": ('{"text": "a"}\n["b"]\n', r"list.jsonl:2: a list, not an object", ValueError),
    "field.jsonl": ('{"body": "a"}\n', r"no field 'text', only body.*--text-field", ValueError),
    "number.jsonl": ('{"text": 3}\n', r"row 1: field 'text' is int, not text", ValueError),
    "bytes.txt": (b"\xff\xfe\x00", r"bytes.txt: not UTF-8", ValueError),
    "broken.parquet": ("no parquet", r"cannot read corpus file .*broken.parquet", ValueError),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_file_and_the_remedy(tokenizer, tmp_path, name, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    content, message, kind = CASES[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(kind, match=message):
        pack_corpus(path, tokenizer, block_size=64)
    with pytest.raises(kind, match=message):
        text_batches(path, tokenizer, block_size=64, batch_size=1)
    gc.collect()
    assert os.listdir(tmp_path / "temporary") == [], "an error left files behind"


def test_option_errors(tokenizer, text_file, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        packed_corpus(tmp_path, tokenizer, block_size=4)
    with pytest.raises(ValueError, match="paths is empty"):
        packed_corpus([], tokenizer, block_size=4)
    with pytest.raises(ValueError, match="block_size=1"):
        packed_corpus(text_file, tokenizer, block_size=1)
    with pytest.raises(ValueError, match="documents='page'"):
        packed_corpus(text_file, tokenizer, block_size=4, documents="page")
    with pytest.raises(ValueError, match="batch_size=0"):
        text_batches(text_file, tokenizer, block_size=4, batch_size=0)

    class Endless:
        eos_token_id = None

    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        packed_corpus(text_file, Endless(), block_size=4)
