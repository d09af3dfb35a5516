"""Reads a comparison from YAML, or from the config.json of its folder; every key is checked.

What the values may be is checked by the dataclasses of `config` and `method_config`; this file
says where in the file the wrong one stands.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from gradloc.compare.config import (
    MIX_KEYS,
    CompareConfig,
    TraceConfig,
    TrainingConfig,
    WorldConfig,
)
from gradloc.compare.method_config import Localize, MethodConfig
from gradloc.files import read_json, write_json

CONFIG_FILE = "config.json"
"""Its name in a comparison's folder."""
_SCHEMA = "gradloc.compare"
_VERSION = 1
# What a method may have beside `localize`: plain values, and parts that are imported when they are
# met, as they bring torch.
_METHOD_VALUES = {
    "title": str,
    "learning_rates": tuple[float, ...],
    "seeds": tuple[int, ...],
    "draws": int,
}
_METHOD_PARTS = {
    "replay": ("gradloc.training.mixing", "Replay"),
    "mix_review": ("gradloc.training.mixing", "MixReview"),
    "self_replay": ("gradloc.training.self_replay", "SelfReplay"),
    "recadam": ("gradloc.recadam", "RecAdam"),
    "lora": ("gradloc.training.lora", "Lora"),
    "slow_weights": ("gradloc.training.slow_weights", "SlowWeights"),
}
_Data = TypeVar("_Data")


def read_config(path: str | Path) -> CompareConfig:
    """Read a YAML file.

    Args:
        path: of the file; `docs/compare.md` has its form.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key or a value that is wrong; with the file, the place in
            it, and near matches of an unknown key.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {str(source)!r}")
    with _at(str(source)):
        config = config_from(_parse_yaml(source.read_text(encoding="utf-8")))
        from gradloc.compare.study import check_world

        with _at("world"):
            check_world(config.world.kind, config.world.options)
    return config


def save_config(config: CompareConfig, folder: Path) -> None:
    """Write config.json, whole or not at all."""
    write_json(folder / CONFIG_FILE, config.to_json(), schema=_SCHEMA, version=_VERSION)


def load_config(folder: Path) -> CompareConfig:
    """Read the config.json of a comparison's folder.

    Raises:
        FileNotFoundError: there is none, so the folder is no comparison's.
        ValueError: it is not what `save_config` writes.
    """
    path = folder / CONFIG_FILE
    body = read_json(path, schema=_SCHEMA, version=_VERSION)
    with _at(str(path)):
        return config_from({k: v for k, v in body.items() if k not in ("schema", "version")})


def config_from(body: Any) -> CompareConfig:
    """Make a configuration of what a file holds.

    Args:
        body: mappings, lists and plain values.

    Raises:
        ValueError: an unknown key, a missing one, or a wrong value; with its place.
    """
    given = dict(_mapping(body))
    _check_keys(given, {field.name for field in fields(CompareConfig)})
    _require(given, ("world", "budget_tokens", "seeds", "learning_rates", "methods"))
    with _at("world"):
        options = dict(_mapping(given.pop("world")))
        _require(options, ("kind",))
        world = WorldConfig(kind=_plain_value(str, options.pop("kind"), "kind"), options=options)
    training = _part(TrainingConfig, given.pop("training", None), "training")
    trace = _part(TraceConfig, given.pop("trace", None), "trace")
    methods = given.pop("methods")
    shared = _values(typing.get_type_hints(CompareConfig), given)
    with _at("methods"):
        read = tuple(
            _method(name, method, shared) for name, method in dict(_mapping(methods)).items()
        )
    return CompareConfig(world=world, training=training, trace=trace, methods=read, **shared)


def _method(name: Any, body: Any, shared: Mapping[str, Any]) -> MethodConfig:
    with _at(str(name)):
        given = dict(_mapping(body))
        _check_keys(given, {*_METHOD_VALUES, *_METHOD_PARTS, "localize"})
        mixed = [key for key in MIX_KEYS.values() if key in given]
        if len(mixed) > 1:
            raise ValueError(f"{' and '.join(mixed)}: each says what is mixed in, so give one")
        made: dict[str, Any] = {}
        for key, (module, kind) in _METHOD_PARTS.items():
            if key in given:
                part = _part(getattr(import_module(module), kind), given.pop(key), key)
                made["mix" if key in mixed else key] = part
        with _at("localize"):
            made["localize"] = _localize(given.pop("localize", None))
        values = {
            "title": str(name),
            "learning_rates": shared["learning_rates"],
            "seeds": shared["seeds"],
            **_values(_METHOD_VALUES, given),
        }
        return MethodConfig(name=str(name), **made, **values)


def _localize(body: Any) -> Localize:
    if body is None:
        return Localize()
    if isinstance(body, str):
        return Localize(policy=body)
    given = dict(_mapping(body))
    threshold = _threshold(given.pop("threshold", "mean"))
    _check_keys(given, {field.name for field in fields(Localize)})
    return Localize(threshold=threshold, **_values(typing.get_type_hints(Localize), given))


def _threshold(value: Any) -> Any:
    """As the command line has it: mean, quantile:0.5, or a number."""
    if isinstance(value, list):
        return tuple(value)  # Localize checks what is in it
    if not isinstance(value, str) or value == "mean":
        return value
    name, colon, number = value.partition(":")
    try:
        return ("quantile", float(number)) if name == "quantile" and colon else float(value)
    except ValueError:
        raise ValueError(f"threshold={value!r}: give mean, quantile:0.5, or a number") from None


def _part(kind: type[_Data], body: Any, key: str) -> _Data:
    """A dataclass of a mapping; nothing, as in `lora:`, means its defaults."""
    with _at(key):
        given = dict(_mapping({} if body is None else body))
        known = [field for field in fields(kind) if field.init]  # type: ignore[arg-type]
        _check_keys(given, {field.name for field in known})
        _require(
            given,
            [
                field.name
                for field in known
                if field.default is MISSING and field.default_factory is MISSING
            ],
        )
        return kind(**_values(typing.get_type_hints(kind), given))


def _values(hints: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the types that are hinted."""
    return {key: _plain_value(hints[key], value, key) for key, value in given.items()}


def _plain_value(hint: Any, value: Any, key: str) -> Any:
    """A value as a type of the kinds that configurations have, or a ValueError.

    1e-3 without a point is a text in YAML 1.1, and a whole number serves as a fraction.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inside:
            return None
        return _plain_value(next(one for one in inside if one is not type(None)), value, key)
    if origin is tuple and isinstance(value, (list, tuple)):
        num = len(value) if inside[-1] is Ellipsis else len(inside)
        if len(value) != num:
            raise ValueError(f"{key}={list(value)!r}: give {num} values")
        return tuple(_plain_value(inside[0], item, key) for item in value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    expected = {
        float: "a number", int: "a whole number", str: "text", bool: "true or false",
        tuple: "a list",
    }.get(origin or hint, str(hint))  # fmt: skip
    raise ValueError(f"{key}={value!r}: must be {expected}")


def _mapping(body: Any) -> Mapping[str, Any]:
    if body is None:
        return {}
    if not isinstance(body, Mapping):
        raise ValueError(f"{body!r} stands where keys with values (key: value) must")
    return body


def _check_keys(given: Mapping[str, Any], known: Collection[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=2)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(f"unknown key {key!r}: {hint}(known: {', '.join(sorted(known))})")


def _require(given: Mapping[str, Any], keys: Collection[str]) -> None:
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given")


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put the place before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        """Plain values only, and no key twice in a mapping, where YAML would keep the last."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in found:
                raise ValueError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader=Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
