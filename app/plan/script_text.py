"""What the text of a script says about how it finds its peers. Only warnings: all of it is legal somewhere."""

import ast
import re
from collections.abc import Callable, Iterator

from app.config.problems import Problem, problem

LOOPBACK = re.compile(r"127\.|localhost$|::1$")
STARTS_RANKS = re.compile(r"\b(torchrun|accelerate +launch|deepspeed +\S+\.py|torch\.distributed\.(?:run|launch))\b")

Place = tuple[int, str, str]
"""(line, id of the problem, what stands there)"""


def concerns(file: str, text: str, nnodes: int) -> list[Problem]:
    """Each place that will not do under a launcher on `nnodes` nodes, in the order of the lines."""
    return [
        problem(id, "warning", file=file, line=str(line), given=given)
        for line, id, given in sorted({*_places(text, nnodes)})
    ]


def _places(text: str, nnodes: int) -> Iterator[Place]:
    if text.startswith("#!") and "python" not in text.partition("\n")[0]:
        return _in_shell(text)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # A shell script, another Python, or a mistake that Python itself tells best.
        return _in_shell(text)
    return (place for check in CHECKS for place in check(tree, text, nnodes))


def _in_shell(text: str) -> Iterator[Place]:
    for number, line in enumerate(text.splitlines(), 1):
        if hit := STARTS_RANKS.search(line.partition("#")[0]):
            yield number, "script.starts-ranks", hit[1]


def _sets_variables(tree: ast.Module, _text: str, nnodes: int) -> Iterator[Place]:
    for node in _unconditional(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
            continue
        for name in (_environ_key(target) for target in node.targets):
            value = str(node.value.value)
            if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                yield node.lineno, "script.sets-rank", f"{name}={value}"
            elif name == "MASTER_PORT":
                yield node.lineno, "script.sets-master-port", value
            elif name == "MASTER_ADDR" and nnodes > 1 and LOOPBACK.match(value):
                yield node.lineno, "script.sets-master-addr", value


def _calls(tree: ast.Module, _text: str, nnodes: int) -> Iterator[Place]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, words = _name(node.func), {each.arg: each.value for each in node.keywords}
        method, rank = _leading_text(words.get("init_method")), words.get("rank")
        if name == "init_process_group" and nnodes > 1 and re.match(r"tcp://(127\.|localhost|\[::1\])", method):
            yield node.lineno, "script.init-method", method
        if name in ("init_process_group", "DistributedSampler") and nnodes > 1 and rank is not None and _is_local(rank):
            yield node.lineno, "script.local-rank-as-rank", name
        module, several = _name(getattr(node.func, "value", None)), words.get("nprocs")
        one = isinstance(several, ast.Constant) and several.value == 1
        if name == "spawn" and module in ("mp", "multiprocessing") and several and not one:
            yield node.lineno, "script.spawns", name


def _local_rank_argument(tree: ast.Module, text: str, _nnodes: int) -> Iterator[Place]:
    if "LOCAL_RANK" in text or "deepspeed" in text:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "add_argument":
            options = {each.value for each in node.args if isinstance(each, ast.Constant)}
            if options & {"--local_rank", "--local-rank"}:
                yield node.lineno, "script.local-rank-argument", "--local_rank"


CHECKS: tuple[Callable[[ast.Module, str, int], Iterator[Place]], ...] = (_sets_variables, _calls, _local_rank_argument)


def _unconditional(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below an `if` or `try`, with which a script may serve other ways to start it as well."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.If, ast.Try)) or _is_main(child):
            yield child
            yield from _unconditional(child)


def _is_main(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def _environ_key(target: ast.expr) -> str:
    """NAME of `os.environ["NAME"]`."""
    if (
        isinstance(target, ast.Subscript)
        and _name(target.value) == "environ"
        and isinstance(target.slice, ast.Constant)
    ):
        return str(target.slice.value)
    return ""


def _name(node: ast.AST | None) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _leading_text(node: ast.expr | None) -> str:
    """The text, or the part of an f-string before its first value."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _leading_text(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_local(node: ast.expr) -> bool:
    """`local_rank`, `args.local_rank`, or what is read from LOCAL_RANK."""
    return any(
        _name(each).lower() == "local_rank" or (isinstance(each, ast.Constant) and each.value == "LOCAL_RANK")
        for each in ast.walk(node)
    )
