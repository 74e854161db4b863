"""``fedbonsai advise``, and the notice of a run whose frozen trunk does not pay."""

import json
import sys
import types
from dataclasses import dataclass

import fedbonsai
import pytest
import yaml
from fedbonsai.policies.partitioning.ecofed import EcoFed
from fedbonsai.policies.partitioning.local_loss import LocalLoss
from fedbonsai.policies.partitioning.splitfed import SplitFed
from fedbonsai.policies.policy import chain
from fedbonsai.policies.pruning.width import Width
from fedbonsai.policies.selection.plain import All, RandomCohort
from fedbonsai.policies.sparsity.zerofl import ZeroFL
from fedbonsai.runtime.advice.comparison import cohorts, methods_of
from fedbonsai.runtime.cli import main as cli
from fedbonsai.runtime.cli.advise import advise
from fedbonsai.runtime.configuration.config import load_config
from fedbonsai.runtime.errors import ConfigError
from fedbonsai.runtime.events import Notice, RunEnded
from torch import nn

BOARD = {
    "name": "board",
    "flop_per_s": "13 GFLOP/s",
    "memory_bytes": "2 GB",
    "up_bytes_per_s": "10 Mbit/s",
    "down_bytes_per_s": "10 Mbit/s",
}
METHODS = ("FedAvg", "SplitFed", "local loss", "EcoFed", "HeteroFL", "REFT", "ProFL", "ZeroFL")
FLEET = {"classes": [BOARD | {"count": 4}], "hosts": {"flop_per_s": "5 TFLOP/s"}}
ECOFED = [{"name": "random", "cohort": 1.0}, {"name": "ecofed"}]


def settings(model, shape, samples, *, policy=None, **changes):
    data = {"name": "synthetic", "kwargs": {"shape": shape, "classes": 10, "samples_per_device": samples}}
    base = {"model": model, "data": data, "fleet": FLEET, "training": {"batch_size": 10}, "backend": "inline"}
    return base | ({"policy": policy} if policy else {}) | changes


def rows(**changes):
    found = advise(load_config(settings(**changes)))
    return {row.method: row for row in found.methods}, found.verdict


@pytest.mark.soak  # half of its time is the search for ProFL's groups
def test_on_vgg_ecofed_is_cheaper_in_both_as_the_paper_says():
    policy = [{"name": "random", "cohort": 1.0}, {"name": "ecofed", "cut": "features.4", "bits": 0}]
    found, verdict = rows(model="vgg11_bn", shape=[3, 32, 32], samples=500, policy=policy)
    # Of 34,440,970 parameters, 76,032 before the cut, 128 x 8 x 8 activations, uploads every other round; 4 bytes each.
    formulas = {
        "FedAvg": 8 * 34_440_970,
        "SplitFed": 8 * 76_032 + 8 * 500 * 8192 + 8 * 500,
        "local loss": 8 * (76_032 + 81_930) + 4 * 500 * 8192 + 8 * 500,
        "EcoFed": (4 * 500 * 8192 + 8 * 500) / 2,
    }
    for method, expected in formulas.items():
        assert found[method].num_bytes == pytest.approx(expected, rel=0.002)
        assert sum(found[method].cuts.values()) == 4
    assert found["SplitFed"].cuts == found["EcoFed"].cuts == {"features.4": 4}
    assert found["EcoFed"].seconds < found["SplitFed"].seconds < found["FedAvg"].seconds
    assert verdict.startswith("EcoFed: 34x fewer bytes and ")


def test_a_tiny_model_with_many_samples_needs_fewer_bytes_as_a_whole():
    found, verdict = rows(model="digits_cnn", shape=[1, 8, 8], samples=4000, policy=ECOFED)
    # 8 bytes x 38,282 parameters, against 1024 activations x 4 bit x 4000 samples every other round.
    assert found["FedAvg"].num_bytes == pytest.approx(8 * 38_282, rel=0.01)
    assert found["EcoFed"].num_bytes > 2 * found["FedAvg"].num_bytes
    assert verdict.startswith("ZeroFL: ")  # the same model, of which less is sent


def test_the_fields_of_the_configured_policy_are_compared():
    assert methods_of(RandomCohort(cohort=1.0))["SplitFed"] == SplitFed(cut="auto")
    assert methods_of(RandomCohort(cohort=1.0))["EcoFed"] == EcoFed()
    own = chain(RandomCohort(cohort=0.5), EcoFed(cut="a", first="a", bits=8))
    assert methods_of(own)["EcoFed"] == EcoFed(cut="a", first="a", bits=8)
    assert methods_of(own)["SplitFed"] == SplitFed(cut="a", first="a")
    assert methods_of(own)["local loss"] == LocalLoss(cut="a", first="a")
    assert methods_of(LocalLoss(cut="b", bits=8))["local loss"] == LocalLoss(cut="b", bits=8)
    assert methods_of(LocalLoss(cut="b"))["EcoFed"] == EcoFed(cut="b")
    assert methods_of(SplitFed(cut="b"))["EcoFed"] == EcoFed(cut="b")
    assert methods_of(SplitFed(cut="auto", first="b"))["EcoFed"] == EcoFed(first="b")
    assert cohorts(own) == [0.5]


def test_devices_that_cannot_take_part_are_shown():
    shy, small = {"name": "shy", "may_send": ["weights", "statistics"]}, {"name": "small", "memory_bytes": "200 kB"}
    classes = [BOARD | shy, BOARD | small]
    found, verdict = rows(model="digits_cnn", shape=[1, 8, 8], samples=50, fleet={"classes": classes})
    assert found["FedAvg"].unable == (("small: memory: needs 0.73 MB, has 0.2 MB", 1),)
    assert [reason.partition(",")[0] for reason, _ in found["EcoFed"].unable] == [
        "shy: it is split and sends activations"
    ]
    assert "; 1 device cannot take part in FedAvg" in verdict


def test_a_model_that_can_be_neither_cut_nor_narrowed_has_one_row_with_costs():
    model = {"name": "torch.nn:Linear", "kwargs": {"in_features": 4, "out_features": 10}}
    found, verdict = rows(model=model, shape=[4], samples=50)
    assert list(found) == ["FedAvg", "HeteroFL", "REFT", "ZeroFL"]
    assert verdict == "only FedAvg can be carried out"
    ((reason, number),) = found["ZeroFL"].unable
    assert (number, reason.partition(",")[0]) == (4, "any: training.sparsity is set")
    assert "no layer of this model can be sparse by default" in reason
    why = "any: this model cannot be narrowed: it has no channels but those of its inputs and outputs"
    assert found["HeteroFL"].unable == found["REFT"].unable == ((why, 4),)
    assert found["REFT"].seconds is None


SLOW = {"name": "slow", "flop_per_s": "1 GFLOP/s"}


def test_narrow_methods_have_the_widths_of_the_devices():
    """Three devices are 13 times as fast as the fourth, which gets what it can train in the time of the others."""
    fleet = {"classes": [BOARD | {"count": 3}, BOARD | SLOW]}
    found, _ = rows(model="digits_cnn", shape=[1, 8, 8], samples=50, fleet=fleet)
    fedavg, heterofl, reft = (found[name] for name in ("FedAvg", "HeteroFL", "REFT"))
    assert (fedavg.widths, fedavg.cuts) == ((), {"": 4})
    # Half of the channels: convolutions of 8 and 16, linear layers 256-32-10, with their biases.
    whole, half = 38_282, (9 * 8 + 8) + (8 * 9 * 16 + 16) + (256 * 32 + 32) + (32 * 10 + 10)
    assert (heterofl.widths, heterofl.cuts) == (((0.5, 1), (1.0, 3)), {"": 4})
    assert heterofl.num_bytes == pytest.approx(8 * (3 * whole + half) / 4, rel=0.03)
    ((narrow, one), (full, three)) = reft.widths
    assert (one, full, three) == (1, 1.0, 3)
    assert 0.3 < narrow < 0.8
    assert heterofl.seconds == pytest.approx(reft.seconds) == pytest.approx(0.253, rel=0.01)
    assert fedavg.seconds > 1.2 * reft.seconds


def test_narrow_methods_have_the_fields_of_the_configured_policy():
    given = Width(channels="batchnorm", deadline_s=3.0)
    methods = methods_of(chain(RandomCohort(cohort=1.0), given))
    assert (methods["REFT"], methods["HeteroFL"].channels) == (given, "prefix")
    rolling = Width(channels="rolling", unit="width")
    assert methods_of(rolling)["HeteroFL"] == rolling
    assert methods_of(rolling)["REFT"] == Width()
    widths = {"board": 1.0, "slow": 0.5}
    policy = ["all", {"name": "width", "rule": "fixed", "widths": widths, "channels": "prefix"}]
    fleet = {"classes": [BOARD, BOARD | SLOW]}
    found, _ = rows(model="digits_cnn", shape=[1, 8, 8], samples=50, fleet=fleet, policy=policy)
    assert found["HeteroFL"].widths == ((0.5, 1), (1.0, 1))


def test_a_device_that_cannot_hold_the_narrowest_part_is_shown():
    fleet = {"classes": [BOARD | {"count": 2}, BOARD | {"name": "tiny", "memory_bytes": "10 kB"}]}
    found, _ = rows(model="digits_cnn", shape=[1, 8, 8], samples=50, fleet=fleet)
    ((reason, number),) = found["REFT"].unable
    assert number == 1
    assert reason.startswith("tiny: memory: needs at least 0.")
    assert found["REFT"].widths == ((1.0, 2),)


def test_a_family_that_cannot_be_narrowed_is_named():
    families = {"flat": {"name": "tests_of_advise:Flat"}}
    fleet = {"classes": [BOARD, BOARD | {"name": "other", "model": "flat"}]}
    module = types.ModuleType("tests_of_advise")
    module.Flat = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        found, _ = rows(model="digits_cnn", shape=[1, 8, 8], samples=50, fleet=fleet, models=families)
    ((reason, number),) = found["REFT"].unable
    assert number == 2
    assert reason.startswith("any: models.flat: this model cannot be narrowed: ")


DIGITS = {"model": "digits_cnn", "shape": [1, 8, 8], "samples": 50}
SPARSE = {"training": {"batch_size": 10, "sparsity": {"weights": 0.95, "activations": 0.5}}}
WEIGHTS = 9 * 16 * 32 + 512 * 64  # of the two sparse layers of digits_cnn


def test_without_sparse_layers_the_row_of_zerofl_is_that_of_its_preset():
    found, _ = rows(**DIGITS)
    fedavg, zerofl = found["FedAvg"], found["ZeroFL"]
    assert (fedavg.sparsities, zerofl.sparsities) == ((), ((0.9, 4),))
    assert (zerofl.cuts, zerofl.widths) == ({"": 4}, ())
    dense = 38_282 - WEIGHTS
    up = 2 * (0.3 * WEIGHTS + dense)  # 16 bits a value, and the positions of 30 % of the weights
    assert 0.75 * 4 * 38_282 < zerofl.num_bytes - (up + 0.88 * WEIGHTS / 8) < 4 * 38_282  # down, lossless
    # Without measured kernels only the bytes gain: computing takes as long as without sparsity.
    link = 10e6 / 8  # bytes a second, in each direction
    saved = (fedavg.num_bytes - zerofl.num_bytes) / link
    assert fedavg.seconds - zerofl.seconds == pytest.approx(saved, rel=1e-3)
    assert zerofl.peak_memory_bytes == pytest.approx(fedavg.peak_memory_bytes, rel=0.001)


def test_the_row_of_zerofl_has_the_configured_sparsity_and_policy():
    policy = ["all", {"name": "zerofl", "rule": "all", "down": "configured"}]
    found, _ = rows(**DIGITS, **SPARSE, policy=policy)
    assert found["ZeroFL"].sparsities == ((0.95, 4),)
    assert found["ZeroFL"].num_bytes == found["FedAvg"].num_bytes
    assert methods_of(RandomCohort(cohort=1.0))["ZeroFL"] == ZeroFL()
    given = ZeroFL(ratios=(0.1,))
    assert methods_of(chain(All(), given))["ZeroFL"] == given


def test_measured_kernels_count_in_the_row_of_zerofl():
    table = {f"{layer} at 0.95, 0.5": {"times": [0.5, 0.5, 0.5]} for layer in ("features.2", "classifier.0")}
    kernels = {"kernels": {"sparse": "auto", "table": table}}
    (plain, _), (faster, _) = rows(**DIGITS, **SPARSE), rows(**DIGITS, **SPARSE, **kernels)
    assert faster["ZeroFL"].num_bytes == plain["ZeroFL"].num_bytes
    assert faster["ZeroFL"].seconds < plain["ZeroFL"].seconds


def test_devices_of_zerofl_have_the_deadline_of_the_whole_fleet():
    """Of the first choice three devices of four take the median time; the slow one gets a smaller ratio."""
    fleet = {"classes": [BOARD | {"count": 3}, BOARD | {"name": "far", "up_bytes_per_s": "1 Mbit/s"}]}
    policy = ["all", {"name": "zerofl", "levels": [0.5, 0.9], "ratios": [0.0, 0.2]}]
    found, _ = rows(**DIGITS, **SPARSE, fleet=fleet, policy=policy)
    assert found["ZeroFL"].sparsities == ((0.5, 3), (0.9, 1))


@pytest.fixture(name="call")
def call_fixture(monkeypatch, capsys, tmp_path):
    """``call(settings, "--json")``: exit code, standard output, standard error."""

    def call(raw, *arguments):
        path = tmp_path / "e.yaml"
        path.write_text(yaml.safe_dump(raw))
        monkeypatch.setattr(sys, "argv", ["fedbonsai", "advise", str(path), *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return call


def test_the_command_prints_a_table_and_a_sentence(call):
    code, out, err = call(settings("digits_cnn", [1, 8, 8], 50))
    lines = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line[0] for line in lines[:9]] == ["method", *METHODS]
    assert lines[1][1:5] == ["nothing (4)", lines[1][2], "device class board", "0.306"]
    assert lines[5][1:5] == ["width 1 on 4", lines[1][2], "device class board", "0.306"]
    assert lines[8][1] == "sparsity 0.9 on 4"
    assert len(lines) == 10
    assert "fewer bytes" in lines[9][0]


def test_each_estimated_device_is_a_line_of_progress():
    lines = []
    advise(load_config(settings("digits_cnn", [1, 8, 8], 50)), note=lines.append)
    assert lines[0] == "FedAvg: device class board (1/1)"
    assert {line.partition(":")[0] for line in lines} == set(METHODS)


def test_its_json_is_one_line(call):
    code, out, _ = call(
        settings("digits_cnn", [1, 8, 8], 50), "--preset", "ecofed", "--json", "--set", "policy.1.bits=8"
    )
    found = json.loads(out)
    assert (code, out.count("\n"), sorted(found)) == (0, 1, ["methods", "verdict"])
    assert [row["method"] for row in found["methods"]] == [*METHODS]
    assert found["methods"][-2]["widths"] == [[1.0, 4]]
    assert found["methods"][-1]["sparsities"] == [[0.9, 4]]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("policy.1.cut=x", "error: policy[1] (ecofed) cuts behind 'x'; the clean cuts are: features.0"),
        ("policy.1.bits=1", "error: policy[1] (ecofed): bits is 1"),
        ("model.kwargs.in_channels=3", "error: "),
        ("training.epoch=1", "error: training.epoch is not a setting"),
        ("model=digits_cnm", "error: model.name is 'digits_cnm', which is unknown"),
        ("codecs.up=[nix]", "error: codecs.up: unknown codec 'nix'"),
    ],
)
def test_mistakes_exit_with_two(call, setting, sentence):
    code, out, err = call(settings("digits_cnn", [1, 8, 8], 50), "--preset", "ecofed", "--set", setting)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def notices(*, rounds=1, **changes):
    run = fedbonsai.run(settings(**changes) | {"stop": {"rounds": rounds}, "evaluation": {"where": "none"}})
    return [event.text for event in run if isinstance(event, Notice)], run.summary


def test_a_run_has_a_notice_if_a_frozen_trunk_does_not_pay():
    dear, digits = "a round of EcoFed costs more than it must at these settings: FedAvg ", ("digits_cnn", [1, 8, 8])
    plain = [{"name": "random", "cohort": 1.0}, {"name": "ecofed", "bits": 0}]
    texts, _ = notices(model=digits[0], shape=digits[1], samples=500, policy=plain)
    assert len([text for text in texts if text.startswith(dear) and text.endswith("see fedbonsai advise")]) == 1
    # Of codes, 1.7 times FedAvg's bytes are no more than a guess.
    for samples in (50, 1000):
        texts, _ = notices(model=digits[0], shape=digits[1], samples=samples, policy=ECOFED)
        assert not [text for text in texts if text.startswith(dear)]


def test_a_run_has_no_such_notice_if_it_sends_less():
    common = {"data": {"name": "digits"}, "training": {"epochs": 2, "batch_size": 64}}
    _, fedavg = notices(model="digits_cnn", shape=[], samples=0, rounds=4, **common)
    for uploads in ("period", "views"):
        policy = ["all", {"name": "ecofed", "bits": 8, "uploads": uploads}]
        texts, ecofed = notices(model="digits_cnn", shape=[], samples=0, rounds=4, policy=policy, **common)
        assert ecofed["up_bytes"] + ecofed["down_bytes"] < 0.8 * (fedavg["up_bytes"] + fedavg["down_bytes"])
        assert not [text for text in texts if "costs more" in text]


@pytest.mark.parametrize(
    "policy", [{"name": "local_loss"}, {"name": "local_loss", "cut": "auto"}, {"name": "splitfed"}]
)
def test_a_run_has_a_notice_if_the_cut_transfers_many_times_the_model(policy):
    """Behind the first convolution 4 kB a sample leave the device, where the whole model takes 153 kB each way."""
    digits = {"model": "digits_cnn", "shape": [1, 8, 8]}
    texts, summary = notices(samples=1000, policy=["all", policy | {"cut": policy.get("cut", "features.0")}], **digits)
    few, _ = notices(samples=50, policy=["all", policy], **digits)
    many = [text for text in texts if "what whole models take" in text]
    if policy.get("cut") == "auto":  # each device is cut where it is fastest, which sends less
        assert many == []
    else:
        (text,) = many
        assert text.startswith(f"policy[1] ({policy['name']}) sends ")
        assert text.endswith(" what whole models take (306 kB); see fedbonsai advise")
        size = float(text.partition(" sends ")[2].partition(" MB a round and device")[0]) * 1e6
        devices = sum(summary["outcomes"].values())
        assert size == pytest.approx((summary["up_bytes"] + summary["down_bytes"]) / devices, rel=0.02)
    assert not [text for text in few if "what whole models take" in text]


def test_the_error_of_a_users_policy_is_reported_when_the_run_calls_it():
    @dataclass(frozen=True)
    class Halves(SplitFed):
        """Needs two devices at least."""

        def decide(self, view, state, decision):
            if not view.dispatched:
                decision.plans[1]
            return super().decide(view, state, decision)

    config = load_config(settings("digits_cnn", [1, 8, 8], 50, evaluation={"where": "none"}) | {"stop": {"rounds": 1}})
    run = fedbonsai.run(config, policy=chain(All(), Halves()))
    assert isinstance(list(run)[-1], RunEnded)


def test_only_a_number_or_a_share_is_a_cohort():
    @dataclass(frozen=True)
    class Mine(All):
        cohort: object = "big"

    others = [Mine(cohort=value) for value in ("big", 0, True, 2.0, None)]
    assert cohorts(chain(*others, RandomCohort(cohort=0.5), Mine(cohort=3), EcoFed())) == [0.5, 3]


def test_the_replay_buffer_must_hold_what_any_device_uploads():
    """Of two with equal samples, the one on the fast link is cut behind the first block, which sends 16 times as much."""
    fast = {"name": "fast", "flop_per_s": 1e5, "up_bytes_per_s": 1e9, "down_bytes_per_s": 1e9}
    slow = {"name": "slow", "flop_per_s": 1e12, "up_bytes_per_s": 1e4, "down_bytes_per_s": 1e4}
    policy = ["all", {"name": "ecofed", "cut": "auto", "depth": "classifier.0", "bits": 0}]
    config = settings(
        "digits_cnn",
        [1, 8, 8],
        50,
        policy=policy,
        fleet={"classes": [BOARD | slow, BOARD | fast]},
        replay={"memory_bytes": 100_000},
    )
    with pytest.raises(
        ConfigError, match=r"^replay.memory_bytes is 100000; what device 1 uploads takes about 2\d{5} bytes"
    ):
        advise(load_config(config))


def test_heads_are_compared_without_their_weights(monkeypatch):
    def refused(*_, **__):
        raise MemoryError

    monkeypatch.setattr("fedbonsai.learning.architecture.build_head", refused)
    found, _ = rows(model="digits_cnn", shape=[1, 8, 8], samples=50)
    assert sum(found["local loss"].cuts.values()) == 4
