"""An argument of a type that it cannot have is refused in a sentence that names it, by every function that others call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo

lora = importlib.import_module("zoo.mapping.lora")
push = importlib.import_module("zoo.push")
check = importlib.import_module("zoo.check")
sign = importlib.import_module("zoo.sign")

PATHS: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (zoo.load, "path", {}),
    (zoo.plan, "src", {}),
    (zoo.convert, "src", {"dst": "x"}),
    (zoo.convert, "dst", {"src": "x"}),
    (zoo.export, "canon", {"dst": "x"}),
    (zoo.export, "dst", {"canon": "x"}),
    (zoo.save, "like", {"values": {}, "to": "x"}),
    (zoo.save, "to", {"values": {}, "like": "x"}),
    (zoo.merge, "canon", {"adapter": "x", "to": "x"}),
    (zoo.merge, "adapter", {"canon": "x", "to": "x"}),
    (zoo.merge, "to", {"canon": "x", "adapter": "x"}),
    (zoo.state_dict, "canon", {}),
    (zoo.verify, "canon", {}),
    (zoo.spec, "src", {}),
    (lora.extract, "base", {"tuned": "x", "to": "x"}),
    (push.push, "canon", {"repo": "a/b"}),
    (check.check, "folder", {}),
    (sign.sign, "folder", {"key": "x"}),
    (sign.sign, "key", {"folder": "x"}),
    (sign.check, "key", {"folder": "x"}),
]


@pytest.mark.parametrize("wrong", [None, 3, b"canonical", torch.float32], ids=str)
@pytest.mark.parametrize(("function", "name", "others"), PATHS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_no_path_is_refused_by_the_arguments_name(
    function: Callable[..., Any], name: str, others: dict[str, Any], wrong: object
) -> None:
    with pytest.raises(zoo.ZooError, match=rf"`{name}` is (None|.*, a \w+); expected a path"):
        function(**others, **{name: wrong})


@pytest.mark.parametrize(
    ("function", "given", "told"),
    [
        (zoo.pull, {"name": None}, "`name` is None; expected str"),
        (zoo.pull, {"name": "a/b", "revision": 5}, "`revision` is 5, a int; expected str or None"),
        (zoo.load, {"device": None}, "`device` is None; expected str or torch.device"),
        (zoo.load, {"mesh": "cpu"}, "`mesh` is 'cpu', a str; expected DeviceMesh or None"),
        (zoo.export, {"dst": "x", "dtype": ["bf16"]}, r"`dtype` is \['bf16'\], a list; expected str or None"),
        (zoo.save, {"values": {}, "to": "x", "dtype": {}}, "`dtype` is {}, a dict; expected str or None"),
        (zoo.verify, {"against": 5}, "against is 5; expected the path of a checkpoint"),
        (push.push, {"repo": None}, "`repo` is None; expected str"),
    ],
)
def test_other_arguments_are_refused_by_name(
    function: Callable[..., Any], given: dict[str, Any], told: str, canon: Path
) -> None:
    first = {zoo.load: "path", zoo.export: "canon", zoo.save: "like", zoo.verify: "canon", push.push: "canon"}
    given |= {first[function]: canon} if function in first else {}
    with pytest.raises(zoo.ZooError, match=told):
        function(**given)


@pytest.fixture(scope="module")
def canon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    folder = tmp_path_factory.mktemp("arguments")
    return zoo.convert(tiny.make("llama", folder / "release"), folder / "canonical")


def test_a_mistake_of_ones_own_stays_what_it_is() -> None:
    from zoo.errors import translated

    @translated
    def broken(name: str) -> None:
        raise TypeError(name)

    with pytest.raises(TypeError, match="^text$"):
        broken("text")
