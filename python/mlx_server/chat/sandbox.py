"""Runs chat templates: programs of strangers, which come with a model, on the words of other strangers.

Jinja's immutable sandbox keeps them from Python's internals. Limits end those that run away: each loop's turn, call and
written piece is checked, and neither operators nor methods of texts make a value that is much larger than any prompt.
Out of their reach is only what one filter does with a list that holds itself in effect: `[x, x]` of `[x, x]` of ….
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_eval_context
from jinja2.visitor import NodeTransformer

from mlx_server.errors import InvalidRequestError, ModelLoadError

MAX_RENDER_S = 1.0  # of this thread's CPU time, so that a busy machine makes no difference
MAX_CHARS = 16 << 20  # of all that a template writes, and of each value that it makes
_MAX_BITS = 4096  # of a number that it makes
_MAX_ARGUMENT = 1 << 20  # more than any width, indent or length that a template asks for
_ANY_WIDTH = re.compile(r"[0-9]{4}|\{[^}]*\{")  # in a format: a large width, or one that is an argument


class _Budget:
    """What is left to one render."""

    def __init__(self) -> None:
        self._end_s = time.thread_time() + MAX_RENDER_S
        self._num_chars = 0

    def spend(self, num_chars: int = 0) -> None:
        self._num_chars += num_chars
        check_size(self._num_chars)
        if time.thread_time() > self._end_s:
            raise InvalidRequestError("the chat template takes too long on this conversation", param="messages")


_budget: ContextVar[_Budget] = ContextVar("budget")


def check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise InvalidRequestError("the conversation is too long for the chat template", param="messages")


class Program:
    """A compiled template.

    Attributes:
        variables: names that whoever renders the template can set.
    """

    def __init__(self, source: str) -> None:
        """ModelLoadError if the source is not Jinja."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.variables = _variables(tree) - environment.globals.keys() - {"self"}
            self._template = environment.from_string(_Limits().visit(tree))
        except TemplateSyntaxError as error:
            raise ModelLoadError(f"the model's chat template has a fault in line {error.lineno}") from error
        except RecursionError as error:
            raise ModelLoadError("the model's chat template is nested too deep") from error

    def run(self, variables: Mapping[str, object]) -> str:
        """What the template writes. InvalidRequestError if it refuses the conversation, fails or exceeds a limit."""
        token = _budget.set(_Budget())
        try:
            return "".join(self._template.generate(variables))
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            message = "the model's chat template can't render this conversation"
            raise InvalidRequestError(message, param="messages", code="chat_template_error") from error
        finally:
            _budget.reset(token)


def _variables(tree: nodes.Template) -> frozenset[str]:
    """Names that are read before they are set. Those that are set too count only if asked for (`x is defined`)."""
    is_set = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked: list[nodes.Expr | None] = [
        test.node for test in tree.find_all(nodes.Test) if test.name in {"defined", "undefined"}
    ]
    asked += [filtered.node for filtered in tree.find_all(nodes.Filter) if filtered.name in {"default", "d"}]
    is_asked = {node.name for node in asked if isinstance(node, nodes.Name)}
    return frozenset(meta.find_undeclared_variables(tree) - (is_set - is_asked))


class _Limits(NodeTransformer):
    """Puts a check into each turn of a loop, each piece that is written, and each `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - Jinja's interface
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick")).set_lineno(node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        parts = [nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part for part in node.nodes]
        node.nodes = [_call("written", part) for part in parts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", *node.nodes)


def _call(name: str, *args: nodes.Expr) -> nodes.Call:
    """A call of a method of the environment: no template can write it, or give its name another meaning."""
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def tick(self) -> None:
        """A turn of a loop; `call` does the check."""

    def written(self, value: object) -> str:
        text = str(value)
        _budget.get().spend(len(text))
        return text

    def joined(self, *values: object) -> str:
        texts = [str(value) for value in values]
        check_size(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        _check_arguments(*args, *kwargs.values())
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, str):
            if function.__name__ == "join" and len(args) == 1:
                args = (list(args[0]),)
            _check_method(function.__self__, function.__name__, args)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _ANY_WIDTH.search(value.__self__):
            raise SecurityError("a width that makes too large a text")
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+" if isinstance(left, Sized) and isinstance(right, Sized):
                check_size(len(left) + len(right))
            case "*":
                check_size(_size_of_product(left, right))
            case "**" if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() * right)
            case "%" if isinstance(left, str):
                raise SecurityError("`%` on text makes texts of any size")
        return super().call_binop(context, operator, left, right)


def _size_of_product(left: object, right: object) -> int:
    """The length of a text or list times a number; 0 for numbers, which must not be too large."""
    match left, right:
        case int(), int():
            _check_bits(left.bit_length() + right.bit_length())
        case int(), Sized():
            return left * len(right)
        case Sized(), int():
            return len(left) * right
    return 0


def _check_bits(num_bits: int) -> None:
    if num_bits > _MAX_BITS:
        raise SecurityError("a number without end")


def _check_arguments(*args: object) -> None:
    if any(isinstance(arg, int) and arg > _MAX_ARGUMENT for arg in args):
        raise SecurityError("an argument that makes too large a value")


def _check_method(text: str, name: str, args: Sequence[object]) -> None:
    """Refuse a method of `text` whose result is far larger than what it gets."""
    match name, *args:
        case "replace", str() as old, str() as new, *_:
            check_size(len(text) + text.count(old) * len(new))
        case "join", list() as parts:
            check_size(len(text) * len(parts) + sum(len(part) for part in parts if isinstance(part, str)))
        case "join" | "translate" | "expandtabs", *_:
            raise SecurityError(f"str.{name} of that")


class _Namespace(Namespace):
    """`namespace()` without attributes that Python gives a meaning."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in dict(*args, **kwargs):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
    environment.filters |= {"tojson": _tojson, "indent": _indent, "replace": _replace, "join": _join}
    for name in ("center", "format", "slice", "batch", "wordwrap", "filesizeformat", "pprint"):
        del environment.filters[name]  # no chat template uses them, and some make values of any size
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": time.strftime,
        "namespace": _Namespace,
        "dict": _dict,
    }
    del environment.globals["lipsum"]
    return environment


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: no HTML escapes, non-ASCII text as it is."""
    _check_arguments(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_arguments(width)
    check_size(text.count("\n") * (width if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)


def _replace(text: object, old: str, new: str, count: int = -1) -> str:
    _check_method(str(text), "replace", (str(old), str(new)))
    return str(text).replace(str(old), str(new), count)


@pass_eval_context
def _join(context: EvalContext, value: Iterable[object], separator: str = "", attribute: str | None = None) -> str:
    parts = list(value)
    _check_method(str(separator), "join", (parts,))
    joined: str = do_join(context, parts, separator, attribute)
    return joined


def _raise_exception(message: object) -> NoReturn:
    raise InvalidRequestError(str(message)[:500], param="messages", code="chat_template_error")
