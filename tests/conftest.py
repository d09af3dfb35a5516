"""Fixtures that several test folders share: a tiny language model with its tokenizer, and text."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

# Before anything imports transformers: no test may wait for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` run where there is a device."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same numbers, whatever ran before it."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """Says how much of PyTorch's own optimizer tests was run (test_torch_optimizer_suite*.py)."""
    suite = sys.modules.get("torch_suite")
    if suite is None:
        return
    counts = {
        outcome: sum(
            "test_torch_optimizer_suite" in report.nodeid
            for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counts.values()):
        terminalreporter.write_line(
            f"torch optimizer suite: {counts['passed'] + counts['failed']} tests in "
            f"{suite.COUNT['cases']} cases of options and backend, {counts['failed']} failed, "
            f"{counts['skipped']} skipped"
        )


@pytest.fixture(params=["avx512", "avx2", "plain"])
def simd(request) -> str:
    """Runs the test with each instruction set of the compiled core that this machine has."""
    from gradloc import ops

    if request.param not in ops.build_info()["simd_available"]:
        pytest.skip(f"this processor or build has no {request.param}")
    ops.select_simd(request.param)
    yield request.param
    ops.select_simd("auto")


@pytest.fixture(params=["emulator", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """The emulated device, to which CPU tensors go then, or a GPU; see kernel_devices.py."""
    from kernel_devices import CudaDevice, EmulatedDevice, emulated_core

    from gradloc import ops

    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
        return CudaDevice()
    core = emulated_core()
    core.reset()
    monkeypatch.setitem(ops.DEVICE_CORES, "cpu", core)
    return EmulatedDevice(core)


@pytest.fixture
def cuda_kernels():
    """For tests that say nothing with plain torch in the place of compiled kernels."""
    import torch

    from gradloc import ops

    if "cuda" not in ops.DEVICE_CORES:
        pytest.skip("gradloc was built without CUDA")
    assert ops.kernel_problem(torch.device("cuda", 0)) == ""


@pytest.fixture
def num_threads():
    """A function that sets torch's number of threads, which is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


_NAMES = ["Arvo", "Belun", "Castra", "Domir", "Elzéa", "Fondi", "Gorlan", "Hestia", "Ilmar", "Jurd"]
_TOWNS = ["Mirek", "Nolby", "Ostra", "Pélin", "Quada", "Rusto", "Salven", "Tirna", "Ulmo", "Vestry"]


def fact(index: int, shift: int = 0) -> tuple[str, str]:
    """(sentence, town) about name `index`; another shift tells of other towns."""
    town = _TOWNS[(index + shift) % len(_TOWNS)]
    return f"The capital of {_NAMES[index]} is {town}.", town


def sentences(count: int, seed: int = 0, shift: int = 0) -> list[str]:
    """Facts and ordinary sentences, the same for the same arguments."""
    draw = random.Random(seed)
    verbs, nouns = (
        ["sees", "takes", "finds", "likes"],
        ["river", "stone", "house", "garden", "road"],
    )
    lines = []
    for number in range(count):
        if number % 2:
            lines.append(fact(draw.randrange(len(_NAMES)), shift)[0])
        else:
            lines.append(f"The {draw.choice(nouns)} {draw.choice(verbs)} the {draw.choice(nouns)}.")
    return lines


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE trained on the sentences: fast, with offsets, no token unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,  # few merges: names take several tokens
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(sentences(400), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def make_gpt2(tokenizer, seed: int = 0):
    """A GPT-2 of two blocks, with dropout, in eval mode as `load_model` gives it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def gpt2(tokenizer):
    return make_gpt2(tokenizer)


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_gpt2(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences(120, seed=1)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def probe_file(tmp_path_factory) -> Path:
    """Six updated and four new probes as spans JSONL."""
    path = tmp_path_factory.mktemp("probes") / "probes.jsonl"
    rows = []
    for index in range(10):
        text, town = fact(index, shift=3)
        start = text.index(town)
        kind = "updated" if index < 6 else "new"
        rows.append({"text": text, "spans": [[start, start + len(town)]], "kind": kind})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Those of tests/training, where `small_runs` stands: a conftest.py there would hide this file.
@pytest.fixture(scope="session")
def dataset(tokenizer, text_file):
    from small_runs import make_dataset

    return make_dataset(tokenizer, text_file)


@pytest.fixture(scope="session")
def tracing(tokenizer, text_file, probe_file):
    from small_runs import make_tracing

    return make_tracing(tokenizer, text_file, probe_file)
