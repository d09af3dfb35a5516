"""Per-batch norms, the tests on them, and the experiment that writes them down."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fact, sentences

from gradloc import LayerMap, trace_gradients
from gradloc.compare.profile_tests import (
    benjamini_hochberg,
    compare_kinds,
    holm,
    kind_correlations,
    layer_ratios,
)
from gradloc.compare.profiles import (
    TracedBatches,
    first_tokens,
    matched_spans,
    placed_spans,
    surprising_spans,
    trace_each,
)

ROOT = Path(__file__).parents[2]
NUM_LAYERS = 20


def token_batch(rows: int, length: int, seed: int, spans=None) -> dict[str, torch.Tensor]:
    """Random tokens; the loss on all of them, or on a (start, stop) a row."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, length), generator=draw)
    labels = ids.clone()
    if spans is not None:
        labels = torch.full_like(ids, -100)
        for row, (start, stop) in enumerate(spans):
            labels[row, start:stop] = ids[row, start:stop]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def drawn_norms(shape: np.ndarray, batches: int, seed: int, *, level=1.0, spread=0.3) -> np.ndarray:
    """Norms of batches that share a profile: a common factor a batch, and noise a layer."""
    draw = np.random.default_rng(seed)
    common = np.exp(spread * draw.standard_normal((batches, 1)))
    return level * shape * common * np.exp(0.3 * draw.standard_normal((batches, len(shape))))


def shape(seed: int) -> np.ndarray:
    return np.exp(0.4 * np.random.default_rng(seed).standard_normal(NUM_LAYERS))


def reference(seed: int) -> np.ndarray:
    return drawn_norms(np.ones(NUM_LAYERS), 16, seed)


# Tracing


def test_every_batch_is_run_once_and_its_norms_kept_apart(gpt2):
    batches = [token_batch(2, 12, seed, [(3, 6), (4, 9)]) for seed in range(4)]
    layers = LayerMap.from_model(gpt2)
    seen = []
    handle = gpt2.register_forward_hook(lambda module, args, output: seen.append(output.loss))
    traced = trace_each(gpt2, batches, layers=layers)
    handle.remove()
    assert len(seen) == len(batches)
    profile = trace_gradients(gpt2, batches, batches[:1], layers=layers, progress=False)
    np.testing.assert_allclose(traced.norms.mean(axis=0), profile.probes["probe"].norms, rtol=1e-12)
    for index, batch in enumerate(batches):
        alone = trace_gradients(gpt2, [batch], [batch], layers=layers, progress=False)
        np.testing.assert_array_equal(traced.norms[index], alone.probes["probe"].norms)
        with torch.no_grad():
            assert traced.losses[index] == pytest.approx(gpt2(**batch).loss.item(), rel=1e-6)
    assert traced.num_tokens == (8, 8, 8, 8)
    assert not gpt2._forward_hooks


def test_traced_batches_come_back_from_json_and_are_checked():
    traced = TracedBatches(
        norms=np.array([[1.0, 2.5], [3.0, 4.0]]), losses=(1, 2), num_tokens=(3, 4)
    )
    back = TracedBatches.from_json(json.loads(json.dumps(traced.to_json())))
    np.testing.assert_array_equal(back.norms, traced.norms)
    assert (back.losses, back.num_tokens) == ((1.0, 2.0), (3, 4))
    with pytest.raises(ValueError, match="num_batches, num_layers"):
        TracedBatches(norms=np.ones((2, 3)), losses=(1.0,), num_tokens=(1, 1))
    with pytest.raises(ValueError, match="finite"):
        TracedBatches(norms=np.full((1, 3), np.nan), losses=(1.0,), num_tokens=(1,))
    with pytest.raises(ValueError, match="losses"):
        TracedBatches.from_json({"norms": [[1.0]]})


def test_one_batch_cannot_be_resampled(gpt2):
    with pytest.raises(ValueError, match="at least 2"):
        trace_each(gpt2, [token_batch(2, 8, 0)], layers=LayerMap.from_model(gpt2))


def test_first_tokens_keeps_as_many_of_each_span():
    batch = token_batch(2, 12, 0, [(3, 6), (5, 11)])
    (short,) = first_tokens([batch], 2)
    assert short["labels"].ne(-100).nonzero().tolist() == [[0, 3], [0, 4], [1, 5], [1, 6]]
    assert short["input_ids"].tolist() == batch["input_ids"][:, :7].tolist()
    with pytest.raises(ValueError, match="only 3 labelled"):
        first_tokens([batch], 4)
    # A label at position 0 has no loss in a causal model, so it counts for nothing.
    (first,) = first_tokens([token_batch(1, 8, 0)], 1)
    assert first["labels"].ne(-100).nonzero().tolist() == [[0, 1]]


def test_matched_spans_are_those_of_tracing(gpt2):
    layers = LayerMap.from_model(gpt2)
    probes = [token_batch(2, 12, seed, [(3, 4), (4, 9)]) for seed in range(2)]
    text = [token_batch(2, 20, 10 + seed) for seed in range(3)]
    matched = matched_spans(text, probes, seed=5, kind="new")
    lengths = [int(row.ne(-100).sum()) for batch in matched for row in batch["labels"]]
    assert set(lengths) == {1, 5}
    profile = trace_gradients(
        gpt2,
        {"new": probes},
        text,
        layers=layers,
        reference_loss="matched-spans",
        seed=5,
        progress=False,
    )
    np.testing.assert_allclose(
        trace_each(gpt2, matched, layers=layers).norms.mean(axis=0),
        profile.references["matched-spans"]["new"].norms,
        rtol=1e-5,
    )


def test_placed_spans_have_the_context_of_the_probes():
    probes = [token_batch(2, 12, 0, [(3, 4), (4, 9)]), token_batch(2, 6, 1, [(1, 2), (5, 6)])]
    text = [token_batch(2, 20, 10 + seed) for seed in range(3)]
    placed = placed_spans(text, probes)
    for index, batch in enumerate(placed):
        shaped = probes[index % 2]["labels"]
        expected = shaped[:, : batch["labels"].shape[1]].ne(-100)
        assert torch.equal(batch["labels"].ne(-100), expected)
        assert torch.equal(batch["input_ids"], text[index]["input_ids"][:, : expected.shape[1]])
    with pytest.raises(ValueError, match="at least as long"):
        placed_spans([token_batch(2, 8, 0)], probes)


def test_surprising_spans_are_as_hard_as_the_probes(gpt2):
    spans = [(3, 4), (4, 9)]
    probes = [token_batch(2, 12, seed, spans) for seed in range(2)]
    candidates = [[token_batch(2, 12, 100 * c + seed) for seed in range(3)] for c in range(1, 6)]
    chosen = surprising_spans(gpt2, candidates, probes)
    assert len(chosen) == 3

    def loss(batch, row):
        with torch.no_grad():
            one_row = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            return gpt2(**one_row).loss.item()

    for index, batch in enumerate(chosen):
        for row in range(2):
            wanted = loss(probes[index % 2], row)
            of_all = [
                abs(loss(placed_spans(one, probes)[index], row) - wanted) for one in candidates
            ]
            assert abs(loss(batch, row) - wanted) == pytest.approx(min(of_all), abs=1e-6)
            assert batch["labels"][row].ne(-100).nonzero()[0].item() == spans[row][0]
    with pytest.raises(ValueError, match="no candidates"):
        surprising_spans(gpt2, [], probes)


# Claim (a)


def test_a_planted_difference_between_kinds_is_found():
    kinds = {"updated": drawn_norms(shape(1), 16, 1), "new": drawn_norms(shape(2), 12, 2)}
    found = compare_kinds(kinds, reference(3), num_permutations=199)
    assert found.p == 1 / 200
    assert found.observed.num_batches == 6
    assert found.observed.within > 0.6
    assert found.observed.statistic > 0.3
    assert found.observed.corrected[0, 1] < 0.5


@pytest.mark.parametrize("level", [1.0, 5.0], ids=["as loud", "louder"])
def test_kinds_of_one_profile_are_not_told_apart(level):
    """Also where one kind's norms are larger throughout: a profile is a shape."""
    p_values, corrected = [], []
    for seed in range(24):
        kinds = {
            "updated": drawn_norms(shape(1), 12, 10 * seed + 1, level=level),
            "new": drawn_norms(shape(1), 16, 10 * seed + 2),
        }
        found = compare_kinds(
            kinds, reference(10 * seed + 3), num_splits=5, num_permutations=99, seed=seed
        )
        p_values.append(found.p)
        corrected.append(found.observed.corrected[0, 1])
    # Of 24 uniform numbers more than 4 lie below 0.05 once in 170 times, and their mean is below
    # 0.35 as rarely.
    assert sum(p < 0.05 for p in p_values) <= 4
    assert np.mean(p_values) > 0.35
    assert np.mean(corrected) == pytest.approx(1.0, abs=0.05)


def test_correlations_of_three_kinds():
    kinds = {name: drawn_norms(shape(seed), 12, seed) for seed, name in enumerate("abc")}
    kinds["d"] = drawn_norms(shape(0), 12, 9)
    found = kind_correlations(kinds, dict.fromkeys(kinds, reference(5)))
    assert found.kinds == ("a", "b", "c", "d")
    np.testing.assert_array_equal(found.matrix, found.matrix.T)
    assert found.matrix[0, 3] == pytest.approx(found.matrix[0, 0], abs=0.1)
    assert max(found.matrix[0, 1], found.matrix[0, 2]) < found.matrix[0, 0] - 0.2
    assert np.diag(found.corrected) == pytest.approx(np.ones(4))


def test_halves_are_disjoint_and_correlations_spearmans():
    """Two batches a kind: a half is one batch, so every number can be had by hand."""
    kinds = {"a": drawn_norms(shape(1), 2, 1), "b": drawn_norms(shape(2), 2, 2)}
    ones = np.ones((2, NUM_LAYERS))
    found = kind_correlations(kinds, dict.fromkeys(kinds, ones), num_splits=400)

    def spearman(x, y):
        return np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1]

    for index, rows in enumerate(kinds.values()):
        assert found.matrix[index, index] == pytest.approx(spearman(*rows))
    between = np.mean([spearman(x, y) for x in kinds["a"] for y in kinds["b"]])
    assert found.matrix[0, 1] == pytest.approx(between, abs=0.05)


# Claim (b)


def test_layers_above_the_reference_are_found_and_no_others():
    profile = np.ones(NUM_LAYERS)
    profile[:6], profile[6:9] = 2.0, 0.5
    probes = drawn_norms(profile, 24, 1, spread=0.1)
    found = layer_ratios(probes, drawn_norms(np.ones(NUM_LAYERS), 24, 2, spread=0.1))
    np.testing.assert_allclose(found.ratio[:6], 2.0, rtol=0.3)
    assert set(np.flatnonzero(found.low > 1)) >= set(range(6))
    assert (found.num_above_corrected, found.num_below_corrected) == (6, 3)
    assert set(np.flatnonzero(holm(np.r_[found.p_above, found.p_below]) < 0.05)) == {
        *range(6),
        *range(NUM_LAYERS + 6, NUM_LAYERS + 9),
    }
    assert (found.low < found.ratio).all()
    assert (found.ratio < found.high).all()


def test_text_against_itself_has_no_layer_above():
    first, second = (drawn_norms(np.ones(NUM_LAYERS), 24, seed, spread=0) for seed in (1, 2))
    found = layer_ratios(first, second)
    assert (found.num_above_corrected, found.num_below_corrected) == (0, 0)
    assert found.num_above + found.num_below <= 5
    assert ((found.p_above + found.p_below) > 0.99).all()


def test_p_of_a_layer_is_exact_where_all_permutations_can_be_tried():
    """Three against three: the most extreme of 20 ways, so p is 1/20 but for the sampling."""
    probes, text = np.array([[5.0], [6.0], [7.5]]), np.array([[1.0], [2.0], [2.5]])
    found = layer_ratios(probes, text)
    assert found.p_above[0] == pytest.approx(1 / 20, abs=0.01)
    assert found.p_below[0] == pytest.approx(1, abs=1e-3)
    assert found.ratio[0] == pytest.approx(18.5 / 5.5)
    assert found.geometric[0] == pytest.approx((5 * 6 * 7.5 / 5) ** (1 / 3))


def test_corrections_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(
        benjamini_hochberg([0.01, 0.04, 0.03, 0.5]), [0.04, 0.16 / 3, 0.16 / 3, 0.5]
    )
    np.testing.assert_allclose(holm([0.9, 0.8]), [1.0, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_kinds({"a": np.ones((4, 3))}, np.ones((4, 3))), "at least two"),
        (lambda: kind_correlations({}, {}), "each kind a reference"),
        (lambda: kind_correlations({"a": np.ones((1, 3))}, {"a": np.ones((4, 3))}), "a has shape"),
        (lambda: kind_correlations({"a": np.ones((4, 3))}, {"a": np.ones((4, 2))}), "3 layers"),
        (lambda: layer_ratios(np.ones((4, 3)), np.ones((4, 2))), "reference has shape"),
        (lambda: layer_ratios(np.ones((4, 2)), np.zeros((4, 2))), "no gradient"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The experiment


@pytest.fixture
def experiment(monkeypatch):
    """experiments/profiles.py as a module; `profiles` is the name of another one here."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    spec = importlib.util.spec_from_file_location(
        "experiments_profiles", ROOT / "experiments/profiles.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bases(tmp_path, model_folder):
    """One seed as `gradloc compare` leaves it, as far as the experiment reads it."""
    folder = tmp_path / "bases/seed-0"
    folder.mkdir(parents=True)
    (folder / "base.json").write_text(json.dumps({"model": str(model_folder)}))
    for number, name in enumerate(("trace", "validation", "measured")):
        rows = []
        for index in range(10):
            text, town = fact(index, shift=number)
            span = [text.index(town), text.index(town) + len(town) + 1]
            kind = "updated" if index < 6 else "new"
            source = f"{name}:{index}"
            rows.append({"text": text, "spans": [span], "kind": kind, "source": source})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate(("reference", "text_old")):
        lines = "\n".join(sentences(120, seed=number))
        (folder / f"{name}.txt").write_text(lines + "\n", encoding="utf-8")
    return folder.parent


def test_a_stopped_experiment_traces_only_what_is_missing(experiment, bases, tmp_path, monkeypatch):
    output = tmp_path / "out"
    command = ["--world", "toy", "--bases", str(bases), "--output", str(output)]
    command += ["--batch-size", "2", "--reference-batches", "3", "--max-length", "16"]
    quick = ["--permutations", "19", "--threads", str(torch.get_num_threads())]
    command += ["--max-probes", "8", *quick]
    traced = []
    trace = experiment.trace_each

    def counted(model, batches, *, layers):
        traced.append(len(batches))
        if len(traced) == 4:
            raise KeyboardInterrupt
        return trace(model, batches, layers=layers)

    monkeypatch.setattr(experiment, "trace_each", counted)
    with pytest.raises(KeyboardInterrupt):
        experiment.main(command)
    folder = output / "seed-0"
    parts = json.loads((folder / "about.json").read_text())["parts"]
    kept = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert len(kept) == 4  # about.json and three parts

    assert experiment.main(command) == 0
    assert len(traced) == len(parts) + 1
    assert {path.stem for path in folder.glob("*.json")} == {"about", *parts}
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    tables = (output / "profiles.md").read_text()
    assert "Unfinished" not in tables
    assert "updated – new" in tables
    assert "text as updated" in tables
    for name in ("profiles.png", "correlations.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    # Nothing is missing: no model is read, and the tables come out the same.
    monkeypatch.setattr(experiment, "base_world", None)
    assert experiment.main(["--summarize", "--output", str(output), *quick]) == 0
    assert (output / "profiles.md").read_text() == tables
    monkeypatch.setattr(experiment, "summarize", lambda *arguments, **options: [])
    assert experiment.main(command) == 0
    with pytest.raises(ValueError, match="another --output"):
        experiment.main([*command, "--max-probes", "6"])


def test_the_experiment_says_what_it_needs(experiment, tmp_path):
    output = ["--output", str(tmp_path / "out"), "--threads", str(torch.get_num_threads())]
    with pytest.raises(ValueError, match="--bases"):
        experiment.main(["--world", "toy", *output])
    with pytest.raises(ValueError, match="--model and --data"):
        experiment.main(["--world", "real", *output])
    with pytest.raises(ValueError, match="--model and --data"):
        experiment.main(["--world", "english", "--model", "x", *output])
    with pytest.raises(FileNotFoundError, match="trace first"):
        experiment.main(["--summarize", *output])
