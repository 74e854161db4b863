import pytest
from fedbonsai.clusters.units import UNITS, format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("512 MB", "bytes", 512_000_000),
        ("512MB", "bytes", 512_000_000),
        ("4 GiB", "bytes", 4 * 1024**3),
        ("1 kB", "bytes", 1000),
        ("1 KB", "bytes", 1000),
        ("1 KiB", "bytes", 1024),
        ("1.5 kB", "bytes", 1500),
        (" 7 ", "bytes", 7),
        (7, "bytes", 7),
        ("20 Mbit/s", "bytes_per_s", 2_500_000.0),
        ("2.5 MB/s", "bytes_per_s", 2_500_000.0),
        ("1 MiB/s", "bytes_per_s", 1_048_576.0),
        ("5.74 Mbit/s", "bytes_per_s", 717_500.0),
        ("3.2 GFLOP/s", "flop_per_s", 3.2e9),
        ("1e9", "flop_per_s", 1e9),
        ("15 ms", "s", 0.015),
        ("2 min", "s", 120.0),
        ("500 mW", "watts", 0.5),
        ("-3 s", "s", -3.0),
    ],
)
def test_reads_exactly(text: object, kind: str, value: float) -> None:
    found = parse_quantity(text, kind=kind, field="x")
    assert found == value
    assert type(found) is type(value)


def test_rounds_once() -> None:
    # 0.1 + 0.2 style errors would show here: 0.7 GB is 700,000,000 bytes and not one less.
    assert [parse_quantity(f"0.{digit} GB", kind="bytes", field="x") for digit in range(1, 10)] == [
        digit * 100_000_000 for digit in range(1, 10)
    ]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("512 Mb", "bytes"),
        ("512 MB/s", "bytes"),
        ("20 Mbit", "bytes_per_s"),
        ("15 MB", "s"),
        ("fast", "flop_per_s"),
        ("", "s"),
        ("1 2 s", "s"),
        (True, "s"),
        (None, "s"),
        (float("nan"), "s"),
        (float("inf"), "s"),
        ("nan", "s"),
        ([1], "bytes"),
    ],
)
def test_refuses_in_one_sentence(value: object, kind: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_quantity(value, kind=kind, field="fleet.classes[1].thing")
    sentence = str(caught.value)
    assert sentence.startswith(f"fleet.classes[1].thing is {value!r}; it must be a number")
    assert all(unit in sentence for unit in UNITS[kind])
    assert "\n" not in sentence


@pytest.mark.parametrize("value", ["0.3 B", 2.5, "1 KiB5", "0.0001 kB"])
def test_bytes_are_whole(value: object) -> None:
    with pytest.raises(ValueError, match=r"^memory_bytes is "):
        parse_quantity(value, kind="bytes", field="memory_bytes")


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (8e9, "bytes", "8 GB"),
        (512e6, "bytes", "512 MB"),
        (0, "bytes", "0 B"),
        (2.5e6, "bytes_per_s", "20 Mbit/s"),
        (717_500.0, "bytes_per_s", "5.74 Mbit/s"),
        (3.2e9, "flop_per_s", "3.2 GFLOP/s"),
        (0.015, "s", "15 ms"),
        (0.0, "s", "0 ns"),
        (5000.0, "s", "5000 s"),
        (10.0, "watts", "10 W"),
    ],
)
def test_prints_for_people(value: float, kind: str, text: str) -> None:
    assert format_quantity(value, kind=kind) == text


def test_printed_quantities_can_be_read_again() -> None:
    for kind, value in [
        ("bytes", 512_000_000),
        ("bytes_per_s", 2.5e6),
        ("flop_per_s", 3.2e9),
        ("s", 0.015),
        ("watts", 10.0),
    ]:
        assert parse_quantity(format_quantity(value, kind=kind), kind=kind, field="x") == pytest.approx(
            value, rel=1e-12
        )
