"""YAML text of settings as plain values: bounded in size, without dates, base-60 numbers, and keys that are given twice."""

from collections.abc import Hashable
from typing import Any

import yaml

from miscc.errors import ConfigError, shown

MOST_CHARACTERS, MOST_NODES = 1 << 18, 20_000  # of a whole file; ours hold a few hundred nodes


class LeadingZeroError(ConfigError):
    """A number such as 010, which YAML 1.1 reads to base 8."""


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader, within bounds.

    YAML 1.1 reads 12:30:45 as a number to base 60 and 2024-13-45 as a date; here both are texts.
    """

    def __init__(self, text: str, numbers: bool = True):
        """numbers: False: numbers are texts, too, as they are spelled"""
        super().__init__(text)
        self.numbers = numbers
        self.num_lines = len(text.splitlines())
        self._sizes: dict[int, int] = {}  # nodes by id; an alias counts as often as it is used

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if is_alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias that refers to itself", problem_mark=node.start_mark)

        # The size with every alias written out.
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [one for item in inside for one in (item if isinstance(item, tuple) else (item,))]
        self._sizes[id(node)] = 1 + sum(self._sizes[id(one)] for one in nodes)
        if self._sizes[id(node)] > MOST_NODES:
            raise yaml.MarkedYAMLError(problem="too many values", problem_mark=node.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            # PyYAML keeps the last one.
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"{shown(key.value)} is given twice; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        digits = node.value.replace("_", "").lstrip("+-")
        if node.tag.endswith(":int") and digits.isdigit() and digits != "0" and digits.startswith("0"):
            plain = "-" * node.value.startswith("-") + (digits.lstrip("0") or "0")
            where = f" in line {node.start_mark.line + 1}" * (self.num_lines > 1)
            raise LeadingZeroError(
                f"{shown(node.value)}{where} begins with 0, which YAML reads as a number to base 8; "
                f"write {plain[:80]}, or '{node.value[:80]}' in quotes for a text"
            )
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag = super().resolve(kind, value, implicit)
        is_text = tag.endswith((":int", ":float")) and (":" in value or not self.numbers)
        return self.DEFAULT_SCALAR_TAG if is_text or tag.endswith(":timestamp") else tag


def read_yaml_text(text: str, numbers: bool = True) -> Any:
    """The document in a text: mappings, lists, texts, numbers, booleans, None.

    numbers: False: each number is the text that it is spelled as, 1.10 is "1.10"

    Raises ConfigError, which says what is wrong.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"has {len(text):,} characters; settings have {MOST_CHARACTERS:,} at most")
    reader = None
    try:
        reader = _Reader(text, numbers)
        return reader.get_single_data()

    # `!!int x` and the like show as nearly any error.
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())[:200]}") from None
    finally:
        if reader is not None:
            reader.dispose()
