"""Loads a causal language model and its tokenizer from a Hugging Face id, a folder, or a GGUF file.

Does not train, trace, or move anything to a device. transformers is imported when a model is
loaded, not before.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def load_model(
    name: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    A tokenizer without a padding token gets its end-of-sequence token as one; the vocabulary keeps
    its size.

    Args:
        name: a Hugging Face id ("openai-community/gpt2"), a folder that `save_pretrained` wrote, or
            the path of a `.gguf` file, which transformers turns back into `dtype` (a 135 M model
            takes some 20 s).
        dtype: of the parameters. float32 is the default because training in less loses small
            updates.

    Returns:
        (model, tokenizer): the model is in eval mode, on the CPU.

    Raises:
        FileNotFoundError: `name` is a path, and nothing is there.
        ValueError: the folder or file is there and holds no causal language model that transformers
            can read.
        OSError: `name` is an id, and neither the local cache nor the hub gives the model.
    """
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {str(path)!r}")
        return _load(str(path), str(path.parent), dtype, gguf_file=path.name)
    if path.is_dir():
        _check_model_folder(path)
        return _load(str(path), str(path), dtype)
    if path.exists():
        raise ValueError(
            f"model={str(path)!r} is a file, but not a .gguf file: give the folder that holds "
            "config.json, or a .gguf"
        )
    if _reads_as_path(os.fspath(name)):
        raise FileNotFoundError(f"no such model folder: {str(path)!r}")
    return _load(os.fspath(name), os.fspath(name), dtype, remote=True)


def _reads_as_path(name: str) -> bool:
    """An id has at most one slash and does not start like a path."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name


def _check_model_folder(path: Path) -> None:
    """Raise ValueError, with the likely remedy, if the folder holds no model."""
    if (path / "config.json").is_file():
        return
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise ValueError(
            f"model={str(path)!r} has no config.json, but it holds a GGUF file: give "
            f"{str(gguf[0])!r}"
        )
    for inner in ("final", "model"):
        if (path / inner / "config.json").is_file():
            raise ValueError(
                f"model={str(path)!r} has no config.json, but {str(path / inner)!r} has: give that "
                "folder"
            )
    raise ValueError(
        f"model={str(path)!r} is not a model folder: it has no config.json. Give a folder that "
        "save_pretrained wrote, "
        "a .gguf file, or a Hugging Face id"
    )


def _load(
    shown: str,
    location: str,
    dtype: torch.dtype,
    *,
    gguf_file: str | None = None,
    remote: bool = False,
) -> tuple[torch.nn.Module, Any]:
    import transformers
    from packaging.version import Version

    # The argument got its present name in transformers 4.56; the older one warns there and above.
    renamed = Version(transformers.__version__) >= Version("4.56")
    options: dict[str, Any] = {"dtype" if renamed else "torch_dtype": dtype}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
        if hasattr(transformers, "GgufConfig"):
            # Versions that have it may otherwise leave the weights packed, which cannot train, and
            # mark even unpacked ones as quantised, so that Trainer refuses them.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(location, **options)
        tokenizer_options = {} if gguf_file is None else {"gguf_file": gguf_file}
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **tokenizer_options)
    except Exception as error:  # a broken file makes transformers raise any kind
        raise _explained(shown, error, remote) from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _explained(shown: str, error: Exception, remote: bool) -> Exception:
    """What went wrong, in a line, and what to do about it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if remote:
        return OSError(
            f"cannot load model={shown!r}: it is no folder here, and the Hugging Face hub does not "
            f"give it ({reason}). "
            "Check the name and the connection, or download the model and give its folder or .gguf "
            "file"
        )
    return ValueError(f"cannot load model={shown!r} as a causal language model: {reason}")


def context_length(model: torch.nn.Module) -> int | None:
    """How many tokens the model can read at once, or None where its configuration sets no limit."""
    config: Any = getattr(model, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
