from pathlib import Path

import pytest
from fedbonsai.comms.codec import CodecChain, CodecSpec, IdentityCodec
from fedbonsai.comms.codecs.lz4_codec import Lz4
from fedbonsai.comms.codecs.make_codec import BUILT_IN, make_codec
from fedbonsai.comms.codecs.sparsify import TopK
from fedbonsai.comms.codecs.ternary import Ternary
from fedbonsai.comms.codecs.uniform import Uniform

MODULE = """
from dataclasses import dataclass
from fedbonsai.comms.codec import IdentityCodec

@dataclass(frozen=True)
class Mine(IdentityCodec):
    strength: float = 1.0

@dataclass(frozen=True)
class NoDecode:
    def layout(self, expected): ...
    def encode(self, tensors, *, context): ...

class Plain:
    def layout(self, expected): ...
    def encode(self, tensors, *, context): ...
    def decode(self, arrays, *, expected, context): ...

number = 5
"""


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's package with a codec, one that cannot be imported, and entry points for both."""
    (tmp_path / "user_codecs.py").write_text(MODULE)
    (tmp_path / "broken_codecs.py").write_text("raise RuntimeError('wrong installation')")
    info = tmp_path / "user-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: user\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedbonsai.codecs]\nmine = user_codecs:Mine\nbroken = broken_codecs:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_names_make_a_chain_and_none_the_identity() -> None:
    assert make_codec(()) == IdentityCodec()
    assert make_codec((CodecSpec("lz4"),)) == Lz4()
    two = (CodecSpec("identity"), CodecSpec("lz4", {"level": 9, "shuffle": False}))
    assert make_codec(two) == CodecChain((IdentityCodec(), Lz4(level=9, shuffle=False)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lz5", {}, r"unknown codec 'lz5' \(did you mean 'lz4'\?\); known are: [a-z0-9, ]*, or module:Class"),
        ("", {}, "unknown codec ''; known are"),
        ("lz4", {"levle": 1}, "codec 'lz4' has no option 'levle'; its options are: level, shuffle"),
        ("identity", {"level": 1}, "codec 'identity' has no option 'level'; its options are: none"),
        ("lz4", {"level": "high"}, "codec 'lz4' with options {'level': 'high'}: Expected `int`, got `str`"),
        ("lz4", {"level": 13}, "codec 'lz4' with options {'level': 13}: level is 13; it must be between 0 and 12"),
        ("lz4", {"shuffle": 1}, "Expected `bool`, got `int`"),
        ("topk", {}, "codec 'topk' with options {}: Object missing required field `density`"),
        ("topk", {"density": 1.5}, "density is 1.5; it must be above 0, and 1 at most"),
        ("topk", {"density": 0.1, "scope": "layer"}, "Invalid enum value 'layer' - at `\\$.scope`"),
        ("threshold", {"value": 0}, "value is 0.0; it must be above 0 and finite"),
        ("float16", {"roles": ["counter"]}, "Invalid enum value 'counter'"),
        ("uniform", {"bits": 9}, "bits is 9; it must be between 2 and 8"),
        ("uniform", {"signed": "maybe"}, "Invalid enum value 'maybe'"),
        ("ternary", {"levels": 3, "rule": "median"}, "levels is 3; with rule 'median' it must be a power of two"),
        ("pack", {"bits": 0}, "bits is 0; it must be between 1 and 8"),
        ("no_such_module:Codec", {}, "codec 'no_such_module:Codec' cannot be imported: No module named"),
        ("math:Codec", {}, "cannot be imported: module 'math' has no attribute 'Codec'"),
        ("math:pi", {}, "codec 'math:pi' names a float; it must name a class"),
        ("collections:OrderedDict", {}, "OrderedDict has no layout and no encode and no decode; it must be a frozen"),
    ],
)
def test_errors_of_configurations_are_one_sentence(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make_codec((CodecSpec(name, options),))
    assert "\n" not in str(caught.value)


def test_options_become_the_types_of_the_fields() -> None:
    lossy = (
        CodecSpec("topk", {"density": 1, "scope": "tensor", "roles": ["weight", "vector"]}),
        CodecSpec("ternary", {"levels": 2}),
        CodecSpec("uniform", {"signed": "auto", "granularity": "channel", "roles": ["vector", "statistic"]}),
    )
    assert make_codec(lossy) == CodecChain(
        (
            TopK(density=1.0, scope="tensor", roles=("weight", "vector")),
            Ternary(levels=2),
            Uniform(signed="auto", granularity="channel", roles=("vector", "statistic")),
        )
    )


def test_two_sparsifiers_are_refused() -> None:
    with pytest.raises(ValueError, match="a chain holds one sparsifier at most; this one holds TopK and Threshold"):
        make_codec((CodecSpec("topk", {"density": 0.1}), CodecSpec("lz4"), CodecSpec("threshold", {"value": 1})))


@pytest.mark.usefixtures("user_package")
def test_a_users_class() -> None:
    codec = make_codec((CodecSpec("user_codecs:Mine", {"strength": 2}),))
    assert (type(codec).__name__, codec.strength) == ("Mine", 2.0)
    with pytest.raises(ValueError, match="NoDecode has no decode"):
        make_codec((CodecSpec("user_codecs:NoDecode"),))
    with pytest.raises(ValueError, match="Plain is no dataclass"):
        make_codec((CodecSpec("user_codecs:Plain"),))


@pytest.mark.usefixtures("user_package")
def test_an_entry_point() -> None:
    assert type(make_codec((CodecSpec("mine"),))).__name__ == "Mine"
    known = ", ".join(sorted({*BUILT_IN, "broken", "mine"}))
    with pytest.raises(ValueError, match=f"known are: {known}, or module:Class"):
        make_codec((CodecSpec("zstd"),))


@pytest.mark.usefixtures("user_package")
def test_a_broken_package_matters_only_if_it_is_named() -> None:
    assert make_codec((CodecSpec("mine"), CodecSpec("lz4")))
    with pytest.raises(ValueError, match="codec 'broken' cannot be loaded from broken_codecs:Mine: wrong installation"):
        make_codec((CodecSpec("broken"),))
