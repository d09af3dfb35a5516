import os
import sys

import pytest
import torch
from conftest import make_gpt2

from gradloc.models import context_length, load_model


def test_a_folder(model_folder, tokenizer):
    model, loaded = load_model(model_folder)
    expected = make_gpt2(tokenizer).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    text = "The capital of Elzéa is Pélin."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_dtype_is_as_asked(model_folder):
    model, _ = load_model(model_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_missing_padding_token_becomes_eos_and_nothing_is_resized(tmp_path, tokenizer):
    make_gpt2(tokenizer).save_pretrained(tmp_path)
    from transformers import PreTrainedTokenizerFast

    core = tokenizer.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(tmp_path)
    model, loaded = load_model(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id is not None
    assert model.get_input_embeddings().num_embeddings == len(loaded) == len(tokenizer)


def test_context_length(gpt2):
    assert context_length(gpt2) == 64
    assert context_length(torch.nn.Linear(2, 2)) is None


def test_paths_that_are_no_models(tmp_path, model_folder, text_file):
    for missing in (tmp_path / "nothing", "./nothing", "~/no/such/folder"):
        with pytest.raises(FileNotFoundError, match="no such model folder"):
            load_model(missing)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match=r"not a model folder: it has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"is a file, but not a \.gguf"):
        load_model(text_file)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(ValueError, match=r"holds a GGUF file: give '.*weights\.gguf'"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load model='.*weights\.gguf'"):
        load_model(tmp_path / "weights.gguf")


def test_the_folder_of_a_run_points_to_its_model(tmp_path, model_folder):
    (tmp_path / "final").symlink_to(model_folder)
    with pytest.raises(ValueError, match="final' has: give that folder"):
        load_model(tmp_path)


def test_a_model_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="as a causal language model: Unrecognized"):
        load_model(tmp_path)


def test_a_broken_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load model="):
        load_model(tmp_path)


def test_an_id_that_nobody_gives():
    with pytest.raises(OSError, match=r"cannot load model='nobody/nothing'.*download the model"):
        load_model("nobody/nothing")


def test_the_package_does_not_import_transformers():
    code = (
        "import sys, gradloc, gradloc.models, gradloc.cli, gradloc.evaluate;"
        "import gradloc.training.corpus, gradloc.training.train;"
        "bad = {'transformers', 'datasets', 'peft', 'matplotlib', 'rich'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # gguf and numpy warn about one another
def test_a_gguf_file():
    path = os.environ.get("GRADLOC_GGUF")
    if not path:
        pytest.skip("set GRADLOC_GGUF to the path of a .gguf language model")
    model, tokenizer = load_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.tensor(
        [tokenizer("Paris is the capital of France, and Rome of Italy.")["input_ids"]]
    )
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 4.5
