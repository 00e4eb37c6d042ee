"""A jinja2 environment for templates that nobody vouches for: no reach into Python, bounded work and memory.

Knows jinja2 and what makes a template expensive; it must not know messages or tokenizers. Work is counted in ticks
(loop rounds and calls), so that a refusal is a function of template and input, never of the machine's speed.
It stops what templates do by mistake and the well-known tricks; a template is still code of the model's folder.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Sized
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TICKS = 300_000  # loop rounds and calls in one rendering
MAX_CHARACTERS = 10_000_000  # of a rendering, and of any text or list made on the way
MAX_COUNT = 100_000  # of a width, an indent or a repetition given to a filter or a text's method
MAX_BITS = 100_000  # of a whole number

_DICT_NAMES = frozenset(dir(dict))
_TEXT_METHODS = frozenset(
    "strip lstrip rstrip split rsplit splitlines startswith endswith upper lower title capitalize find rfind index "
    "count partition rpartition isdigit isalpha isspace removeprefix removesuffix replace join".split()
)
_COUNTED_FILTERS = ("center", "indent", "wordwrap", "truncate", "batch", "slice", "tojson", "round")
_WIDE = re.compile(r"\d{6}|\*")  # a format with a width nobody needs


class TooMuch(SecurityError):
    """A template asked for more work or memory than a prompt can need."""


class _Bounded(CodeGenerator):
    """Compiles loops and `a ~ b` so that the environment can count them."""

    def writeline(self, x: str, node: nodes.Node | None = None, extra: int = 0) -> None:
        super().writeline(x, node, extra)
        if x == "_loop_vars = {}":  # what every compiled loop's body begins with
            super().writeline("environment.tick()")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")))")


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks words to train on; in a prompt it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # how jinja2 extensions declare their tags

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers gives to chat templates, with limits. Counts one rendering at a time, from `reset`."""

    code_generator_class = _Bounded
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, date: datetime.date) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.ticks = 0
        self.filters["tojson"] = _to_json
        self.filters["replace"] = _replace
        self.filters["join"] = _checked_join(self.filters["join"])
        self.filters["format"] = _checked_format(self.filters["format"])
        self.filters["sum"] = _sum_of_numbers
        for name, function in self.filters.items():
            self.filters[name] = _measured(function, name in _COUNTED_FILTERS)
        now = datetime.datetime(date.year, date.month, date.day)
        self.globals["strftime_now"] = lambda pattern: now.strftime(str(pattern))
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]  # makes text of any length

    def reset(self) -> None:
        """Begin to count a new rendering."""
        self.ticks = 0

    def tick(self) -> None:
        """Count one loop round or call; TooMuch beyond MAX_TICKS."""
        self.ticks += 1
        if self.ticks > MAX_TICKS:
            raise TooMuch(f"the template needs more than {MAX_TICKS:,} loop rounds and calls")

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join texts, none of which may make the result longer than MAX_CHARACTERS."""
        found = list(parts)
        _check_size(sum(map(len, found)))
        return "".join(found)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in the sandbox, with short ways for what templates mostly do."""
        kind = type(obj)
        if kind is dict:
            if attribute not in _DICT_NAMES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        elif kind is str:
            if attribute in _TEXT_METHODS:
                return getattr(obj, attribute)
        elif (kind is LoopContext or kind is _Namespace) and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse what the sandbox refuses, and `translate`, whose result has no bound."""
        return attr != "translate" and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`format` as the sandbox has it, without great widths."""
        wrapped = super().wrap_str_format(value)
        return wrapped if wrapped is None else _checked_format(wrapped, str(value.__self__))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # jinja2's own
        """Call from a template, counted; methods of texts with their counts and sizes checked."""
        __self.tick()
        if __obj is _Namespace:
            kwargs.pop("_loop_vars", None)  # what compiled templates add for macros
            kwargs.pop("_block_vars", None)
            return _Namespace(*args, **kwargs)
        if type(__obj) is BuiltinMethodType and type(__obj.__self__) is str:
            _check_method(__obj.__self__, __obj.__name__, args)
            if __obj.__name__ in _TEXT_METHODS:
                kwargs.pop("_loop_vars", None)
                kwargs.pop("_block_vars", None)
                return __obj(*args, **kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        if type(result) is str:
            _check_size(len(result))
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`* ** + %` after a look at the size of the result."""
        if operator == "+":
            if type(left) is str and type(right) is str:
                _check_size(len(left) + len(right))
                return left + right
            if isinstance(left, Sized) and isinstance(right, Sized):
                _check_size(len(left) + len(right))
        elif operator == "%":
            if isinstance(left, str):
                _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            _check_product(left, right)
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
            raise TooMuch("the template computes a number that is too great")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscored names, the way into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template cannot store the underscored name {name!r}")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TooMuch(f"the template makes a text or list longer than {MAX_CHARACTERS:,}")


def _check_count(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_COUNT:
            raise TooMuch(f"the template gives a width or count of {value:,}; at most {MAX_COUNT:,} is allowed")


def _check_format(pattern: str, values: Iterable[Any]) -> None:
    if _WIDE.search(pattern):
        raise TooMuch(f"the template formats with a width that is too great: {pattern!r:.60}")
    _check_count(values)
    longest = max((len(value) for value in values if isinstance(value, Sized)), default=0)
    _check_size(len(pattern) + longest * (pattern.count("%") + pattern.count("{")))


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(times, int):
            if isinstance(value, Sized):
                _check_size(len(value) * max(times, 0))
            elif isinstance(value, int) and value.bit_length() + times.bit_length() > MAX_BITS:
                raise TooMuch("the template computes a number that is too great")


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> None:
    if name == "replace":
        if len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            _check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join":
        if args and isinstance(args[0], list | tuple):
            _check_size(sum(len(item) + len(text) for item in args[0] if isinstance(item, str)))
    elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
        _check_count(args)


def _measured(function: Callable[..., Any], counted: bool) -> Callable[..., Any]:
    """A filter whose result is measured, and whose numbers are where `counted`; jinja2's marks on it are kept."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        if counted:
            _check_count((*args, *kwargs.values()))
        result = function(*args, **kwargs)
        if type(result) is str:
            _check_size(len(result))
        return result

    measured.__dict__.update(getattr(function, "__dict__", {}))
    return measured


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    """jinja2's `replace` for texts without markup."""
    text = str(value)
    _check_size(len(text) + text.count(str(old)) * len(str(new)))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _checked_join(function: Callable[..., Any]) -> Callable[..., Any]:
    def join(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        items = list(value)
        _check_size(sum(len(item) + len(str(d)) for item in items if isinstance(item, str)))
        return function(context, items, d, attribute)

    join.__dict__.update(function.__dict__)
    return join


def _checked_format(function: Callable[..., Any], pattern: str | None = None) -> Callable[..., Any]:
    def formatted(*args: Any, **kwargs: Any) -> Any:
        template = str(args[0]) if pattern is None else pattern
        _check_format(template, (*(args[1:] if pattern is None else args), *kwargs.values()))
        return function(*args, **kwargs)

    return formatted


def _sum_of_numbers(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """jinja2's `sum` for numbers only: sums of lists have no bound."""
    numbers = [v[attribute] for v in values] if attribute is not None else list(values)
    if not all(isinstance(n, int | float) for n in (start, *numbers)):
        raise SecurityError("the template sums what are not numbers")
    return sum(numbers, start)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
