"""YAML as configurations and fleets use it: plain scalars, lists and mappings, of bounded size.

PyYAML follows YAML 1.1, where a number with an exponent needs a point and a signed exponent (``1.0e-3``) and is text
otherwise, a date is an object, and the last of two equal keys wins. YAML 1.2 (sections 10.3.2 and 3.2.1.3) reads ``1e-3`` as
a number and a date as text, and forbids equal keys; so does this loader. It also refuses input that no settings file needs
and that could exhaust the process: tags of other types, text that is not Unicode, values nested more than
``MOST_DEPTH`` deep, aliases inside the values that they name, and aliases for more than ``MOST_ALIASED`` values in all.
"""

import re
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 * 1024**2  # of a file
MOST_DEPTH = 100
MOST_ALIASED = 100_000
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge", "value"))


class _Loader(yaml.SafeLoader):
    """The safe loader, with the changes that the module's docstring lists."""

    def __init__(self, text: str) -> None:
        """A loader of ``text``."""
        super().__init__(text)
        self._depth = 0
        # Number of values of each complete node, with its aliases expanded, by the identity of the node.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node, within the limits of depth and size."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self._depth == MOST_DEPTH:
            raise _error(f"values are nested more than {MOST_DEPTH} deep", event.start_mark)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error("an alias stands inside the value that it names", event.start_mark)
            return node
        if node.tag not in _TAGS:
            raise _error(f"tag {node.tag.replace(_TAG, '!!')!r} is not allowed in settings", event.start_mark)
        if isinstance(node, yaml.ScalarNode) and not is_unicode(node.value):
            raise _error(f"text {node.value!r} holds half of a surrogate pair", event.start_mark)
        self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in _children(node))
        if self._sizes[id(node)] > len(self._sizes) + MOST_ALIASED:
            raise _error(f"aliases stand for more than {MOST_ALIASED:,} values", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping whose written keys differ; keys that ``<<`` merges into it later may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise _error(f"key {key.value!r} occurs twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):  # others cannot be keys, which is an error when they are constructed
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError) as error:  # "!!int foo", "!!bool 3", a number with too many digits
            if not isinstance(node, yaml.ScalarNode):
                raise
            text = node.value if len(node.value) <= 40 else f"{node.value[:37]}..."
            raise _error(f"{text!r} cannot be read as {node.tag.replace(_TAG, '!!')}", node.start_mark) from error


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Plain data from ``text``. Raises ``ValueError`` in one line, with line and column, where it is not allowed YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{problem}{where}") from error


def read_yaml(path: Path) -> Any:
    """Plain data from a file or a pipe, of which at most ``MOST_BYTES`` are read. Raises ``OSError`` and ``ValueError``."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return parse_yaml(data.decode())


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded as UTF-8; half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
