"""What notebooks show of models and files."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

import gpustore as gs
from gpustore import eras, notebook
from gpustore.julia import JuliaType
from gpustore.notebook import leaf_text
from gpustore.testing import fake_cuda
from gpustore.values import JuliaArray


class Page(HTMLParser):
    """Checks that tags are closed in turn; `text` is what a browser would show."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@dataclasses.dataclass
class Net:
    weight: object

    def __call__(self, x):
        return self.weight * x


def test_every_layer_of_the_table_is_shown_as_a_tree():
    for kind in eras.TABLE:
        assert not kind.fields or hasattr(kind.cls, "_repr_html_"), kind.cls


def test_a_users_own_model_is_shown_unless_it_says_how():
    @gs.model_type("Main.ShownNet")
    @dataclasses.dataclass
    class ShownNet:
        body: object
        rate: object

    @gs.model_type("Main.SaysHow")
    @dataclasses.dataclass
    class SaysHow:
        body: object

        def _repr_html_(self) -> str:
            return "mine"

    net = ShownNet(gs.Dense(3, 2), np.float32(0.1))
    page = Page(net._repr_html_())
    assert "ShownNet" in page.text and "float32 (2, 3)" in page.text
    assert "float32 0.1\n" in page.text and "2 arrays" in page.text
    assert SaysHow(1)._repr_html_() == "mine"
    assert "2 arrays" in Page(gs.Params([np.ones(2), np.ones(3)])._repr_html_()).text
    assert "float64 (2,)" in Page(gs.param(np.ones(2))._repr_html_()).text


def test_a_model_shows_shapes_dtypes_devices_and_bytes():
    page = Page(gs.Chain(gs.Dense(10, 5, gs.relu), gs.softmax)._repr_html_())
    assert "details" in page.tags
    for part in ("Chain(Dense(10, 5, relu), softmax)", "2 arrays, 220 bytes, cpu",
                 "float32 (5, 10), cpu, 200 bytes", "relu"):  # fmt: skip
        assert part in page.text


def test_a_gpu_model_is_shown_without_a_copy(cuda):
    last = cuda.cuda.runtime.getDeviceCount() - 1
    model = gs.gpu(gs.Chain(gs.Dense(3, 2), Net(np.ones(4))), last)
    before = len(getattr(cuda, "transfers", ()))
    page = Page(model._repr_html_())
    assert "3 arrays" in page.text and f"cuda:{last}" in page.text
    assert len(getattr(cuda, "transfers", ())) == before


def test_an_open_file_is_shown_with_its_tags_and_lost_arrays(tmp_path):
    with fake_cuda(1):
        gs.save(tmp_path / "m.bson", model=gs.gpu(gs.Dense(3, 2)), on_gpu="tag", note="<b>")
    with gs.open_file(tmp_path / "m.bson") as stored:
        page = Page(stored._repr_html_())
    assert "m.bson: " in page.text and "written by gpustore" in page.text
    assert "float32 (2, 3), cuda:0, 24 bytes" in page.text and "'<b>'" in page.text
    assert "closed" in Page(stored._repr_html_()).text


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"&', "a\x1b[31m", "\u202eright"])
def test_names_are_escaped(name):
    markup = gs.NamedTuple({name: {name: 1}, "value": name})._repr_html_()
    page = Page(markup)
    assert "script" not in page.tags and "\x1b" not in markup and "\u202e" not in markup


def test_big_models_are_bounded_and_say_what_is_left_out():
    wide = gs.Chain(*[gs.Dense(1, 1) for _ in range(1000)])
    page = Page(wide._repr_html_())
    assert "940 more not shown" in page.text and "2000 arrays" in page.text
    deep = gs.NamedTuple({"a": 1})
    for _ in range(1000):
        deep = gs.NamedTuple({"a": deep})
    assert "1 more not shown" in Page(deep._repr_html_()).text
    many = gs.NamedTuple({str(i): {str(j): [1, 2] for j in range(50)} for i in range(50)})
    markup = many._repr_html_()
    assert markup.count("<div") < 3 * notebook.MAX_NODES and "more not shown" in markup


def test_what_is_shared_or_cyclic_is_shown_once():
    dense = gs.Dense(2, 2)
    assert "shared, shown above" in Page(gs.Chain(dense, dense)._repr_html_()).text
    loop = gs.Chain(dense)
    loop.layers = (dense, loop)
    assert "Chain" in Page(loop._repr_html_()).text


def test_a_value_that_cannot_print_itself_is_named():
    class Silent:
        def __repr__(self) -> str:
            raise ValueError("no")

    assert "Silent" in Page(gs.NamedTuple(a=Silent())._repr_html_()).text


def test_an_array_of_no_dtype_shows_its_type_and_is_not_called_lost():
    shown = leaf_text(JuliaArray(JuliaType.named("Core.Char"), (2,), b"a\0\0\0b\0\0\0"))
    assert shown == "Char (2,)"
