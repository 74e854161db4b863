import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from fedbonsai.learning.data.config import CyclicClasses, DataConfig, Dirichlet, Groups, Iid, Shards
from fedbonsai.learning.spec import Call


def parse(text: str) -> DataConfig:
    return msgspec.convert(yaml.safe_load(text) or {}, DataConfig)


def test_an_empty_section_is_the_digits() -> None:
    assert parse("") == DataConfig(name="digits", partition=Iid())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{name: iid}", Iid()),
        ("{name: dirichlet, alpha: 0.5}", Dirichlet(alpha=0.5)),
        (
            "{name: dirichlet, alpha: 0.5, sizes: equal, min_samples: 8}",
            Dirichlet(alpha=0.5, sizes="equal", min_samples=8),
        ),
        ("{name: shards, shards_per_device: 3}", Shards(shards_per_device=3)),
        ("{name: classes, classes_per_device: 2}", CyclicClasses(classes_per_device=2)),
        ("{name: groups}", Groups()),
    ],
)
def test_partitions_as_users_write_them(text: str, expected: object) -> None:
    assert parse(f"partition: {text}").partition == expected


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("test_share: 1", r"test_share"),
        ("test_share: -0.1", r"test_share"),
        ("partition: {name: dirichlet, alpha: 0}", r"partition\.alpha"),
        ("partition: {name: dirichlet}", r"alpha"),
        ("partition: {name: iid, alpha: 1}", r"alpha"),
        ("partition: {name: magic}", r"partition\.name"),
        ("partition: {alpha: 1}", r"name"),
        ("colour: red", r"colour"),
    ],
)
def test_errors_name_their_position(text: str, where: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=where):
        parse(text)


def test_the_example_in_the_docstring_parses() -> None:
    from fedbonsai.learning.data import config

    assert config.__doc__ is not None
    section = yaml.safe_load(config.__doc__.split("::\n", 1)[1])["data"]
    parsed = msgspec.convert(section, DataConfig)
    assert parsed.train_transforms == (Call("random_crop", {"padding": 4}), Call("random_flip"), Call("normalize"))


def test_it_survives_a_round_trip() -> None:
    config = DataConfig(partition=Dirichlet(alpha=0.1), train_transforms=(Call("random_flip"),), classes=("a", "b"))
    assert msgspec.json.decode(msgspec.json.encode(config), type=DataConfig) == config


def test_the_folder_is_the_root_else_the_environments_else_the_homes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDBONSAI_DATA", raising=False)
    assert DataConfig().folder == tmp_path / ".cache" / "fedbonsai" / "data"
    assert DataConfig(root="~/mine").folder == tmp_path / "mine"
    monkeypatch.setenv("FEDBONSAI_DATA", "/srv/data")
    assert DataConfig().folder == Path("/srv/data")
    assert DataConfig(root="/mnt").folder == Path("/mnt")


def test_planning_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\n" + "".join(
        f"import fedbonsai.learning.data.{name}\n" for name in ("config", "partition", "batches")
    )
    subprocess.run([sys.executable, "-c", code], check=True)
