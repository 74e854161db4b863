import msgspec
import pytest
from fedbonsai.learning.spec import Distillation
from fedbonsai.policies.tasks import Distil


def test_the_task_has_the_settings_of_the_distillation_and_a_name() -> None:
    task = Distil(steps=3, class_prior=1.0)
    assert isinstance(task, Distillation)
    assert Distil.__struct_fields__ == Distillation.__struct_fields__
    assert msgspec.to_builtins(task) == {"name": "distil", "steps": 3, "class_prior": 1.0}
    assert msgspec.json.decode(msgspec.json.encode(task), type=Distil) == task
    assert Distil() == Distil(steps=1000)


@pytest.mark.parametrize(
    "wrong", [{"held_out": 1.0}, {"held_out": 0.0}, {"temperature": 0.0}, {"steps": -1}, {"alpha": 1.0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    for kind in (Distillation, Distil):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"name": "distil", **wrong} if kind is Distil else wrong, kind)
