"""JSON of strangers into dataclasses: the declared types or one line that names file and field."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from stablevm.networks.sit_config import sit_config
from stablevm.support.cards import card_of, read_card
from stablevm.support.errors import UserError
from stablevm.support.files import read_json, write_json


@dataclass(frozen=True)
class Inner:
    depth: int
    scale: float = 1.0
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Card:
    inner: Inner
    kind: Literal["v", "x"]
    shape: tuple[int, int]
    flag: bool
    folder: Path
    capacity: int | Literal["all"] = 1
    names: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    other: Inner | None = None
    anything: Any = None

    def __post_init__(self):
        if self.inner.depth > 100:
            raise UserError(f"depth {self.inner.depth}, expected 100 at most")


GOOD = {"inner": {"depth": 3, "widths": [1, 2]}, "kind": "v", "shape": [2, 3], "flag": True, "folder": "a/b"}


def test_lists_become_tuples_text_paths_and_integers_floats():
    card = card_of(Card, {**GOOD, "table": {"a": 1}, "capacity": "all", "other": {"depth": 1, "scale": 2}}, "here")
    assert card == Card(Inner(3, 1.0, (1, 2)), "v", (2, 3), True, Path("a/b"), "all", [], {"a": 1.0}, Inner(1, 2.0))
    assert type(card.other.scale) is float and type(card.table["a"]) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": {"depth": "3"}}, 'inner.depth: "3", expected an integer'),
        ({"inner": {"depth": True}}, "inner.depth: true, expected an integer"),
        ({"inner": {"depth": 3.0}}, "inner.depth: 3.0, expected an integer"),
        ({"inner": {"depth": 2**63}}, "inner.depth: 9223372036854775808, expected an integer"),
        ({"inner": {"depth": 1, "scale": "a"}}, 'inner.scale: "a", expected a number'),
        ({"inner": {"depth": 1, "scale": float("nan")}}, "inner.scale: NaN, expected a number"),
        ({"inner": {"depth": 1, "widths": [1, None]}}, r"inner.widths\[1\]: null, expected an integer"),
        ({"inner": {"depth": 1, "widths": {}}}, "inner.widths: an object of 0, expected a list"),
        ({"inner": {}}, "inner.depth: missing"),
        ({"inner": [1, 2]}, "inner: a list of 2, expected an object"),
        ({"inner": {"depth": 101}}, "depth 101, expected 100 at most"),
        ({"kind": {}}, "kind: an object of 0, expected one of v, x"),
        ({"kind": "z"}, 'kind: "z", expected one of v, x'),
        ({"shape": [1, 2, 3]}, "shape: a list of 3, expected a list of 2"),
        ({"flag": 1}, "flag: 1, expected true or false"),
        ({"folder": "a\0b"}, r'folder: "a\\x00b", expected a path'),
        ({"folder": ""}, 'folder: "", expected a path'),
        ({"capacity": "most"}, 'capacity: "most", expected an integer or all'),
        ({"names": ["\ud800"]}, r'names\[0\]: "\\ud800", expected text'),
        ({"table": {"a": "b"}}, 'table.a: "b", expected a number'),
        ({"other": {"depth": None}}, "other.depth: null, expected an integer"),
        ({"velvet": 1}, "velvet: unknown to this version"),
        ({"\x1b[31m": 1}, r"\\x1b\[31m: unknown to this version"),
    ],
)
def test_another_type_is_one_line_that_names_the_field(changes, message):
    with pytest.raises(UserError, match=f"^here: .*{message}; restore or remake it$") as caught:
        card_of(Card, {**GOOD, **changes}, "here")
    assert str(caught.value).isprintable()


def test_a_field_that_is_missing_is_named():
    with pytest.raises(UserError, match="here: flag: missing"):
        card_of(Card, {name: value for name, value in GOOD.items() if name != "flag"}, "here")


def test_values_that_are_not_finite_pass_where_they_may_occur():
    assert card_of(Inner, {"depth": 1, "scale": float("inf")}, "here", finite=False).scale == float("inf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 100 + "]" * 100, "nested more than 64 deep"),
        ('{"inner": ' + "7" * 5000 + "}", "not valid JSON"),
        ('"\xff'.encode("latin-1"), "not valid JSON"),
        ("[]", "expected an object, found a list of 0"),
        (" " * (2**26 + 1), "more than 67,108,864 bytes"),
        (None, "is not a file"),
    ],
    ids=["empty", "bomb", "deep", "digits", "bytes", "list", "large", "folder"],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "card.json"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^thing: {path}.*{message}"):
        read_card(path, Card, "thing")


@pytest.mark.parametrize("version", [None, 2, True, "1", {}])
def test_another_format_version_is_refused(tmp_path, version):
    write_json(tmp_path / "card.json", {"format_version": version, "depth": 1})
    with pytest.raises(UserError, match=r"has format version .*, this program reads 1"):
        read_card(tmp_path / "card.json", Inner, "thing", version=1)


def test_names_that_are_no_utf8_survive_in_a_file_that_is(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "x.json", {"data_dir": name})
    json.loads((tmp_path / "x.json").read_bytes().decode("utf-8"))
    assert read_json(tmp_path / "x.json", "x") == {"data_dir": name}


@pytest.mark.parametrize(
    ("field_name", "value"),
    [("depth", 1_000_000), ("hidden_size", 10**12), ("num_classes", 2**40), ("input_size", 0), ("num_heads", 0),
     ("projector_kind", "rnn"), ("projector_dims", [8] * 1000), ("mlp_ratio", 1e9), ("encoder_depth", -1)],
)  # fmt: skip
def test_an_impossible_network_is_refused_before_it_is_built(field_name, value):
    config = sit_config("SiT-XXS/4", input_size=8, in_channels=1, num_classes=4)
    with pytest.raises(UserError, match=f"here: .*{field_name}.* expected"):
        card_of(type(config), {**asdict(config), field_name: value}, "here")
