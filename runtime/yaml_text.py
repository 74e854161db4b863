"""YAML as people mean it: ``1e-3`` is a number, and a key that is written twice is a mistake.

PyYAML follows YAML 1.1, where a number with an exponent needs a point and a signed exponent (``1.0e-3``) and is text
otherwise, and lets the last of two equal keys win. YAML 1.2 (section 10.3.2 and 3.2.1.3) has it as we do.
"""

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """The safe loader with both repairs."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose keys differ, as it is written: what ``<<`` merges into it later may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):  # others cannot be keys, which is told when they are constructed
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain data from ``text``. Raises ``ValueError`` in one line, with the place, when it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{problem}{where}") from error
