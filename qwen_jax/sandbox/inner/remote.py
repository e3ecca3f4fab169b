"""A test in one process and the solution that it tests in another one, so that no solution can decide its own verdict.

The test's process never executes the solution. It calls the solution's functions over a socket and gets plain values
back: numbers, text, containers, and a few classes of the standard library, rebuilt from their contents. Anything else
stays with the solution, and the test holds a `Remote`, which it can call, iterate over, read attributes of and pass
back, but which equals nothing but itself. So to end early, to replace what the test uses, or to define an object that
equals everything makes no test pass.
"""

import builtins
import contextlib
import importlib
import io
import os
import pickle
import socket
import struct
import sys
import types

from . import python_program

_FRAME = struct.Struct("=Q")
_LONGEST = 256 << 20  # bytes of one message
# Classes of values that are rebuilt on the other side, by module.
_VALUES = {
    "builtins": (
        *("set", "frozenset", "complex", "bytearray", "range", "slice", "object", "NotImplemented", "Ellipsis"),
        *("int", "float", "str", "bytes", "bool", "list", "tuple", "dict"),
    ),
    "collections": ("Counter", "OrderedDict", "deque", "defaultdict"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
}
# What a subclass of them is sent as, most special first.
_BASES = (bool, int, float, complex, str, bytes, bytearray, tuple, list, set, frozenset, dict)


class SolutionError(Exception):
    """The solution raised an error of a class that the test does not know, or ended."""


# ----------------------------------------------------------------------------------------------------- messages
def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_FRAME.pack(len(content)) + content)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _FRAME.unpack(_receive_exactly(connection, _FRAME.size))
    if length > _LONGEST:
        raise SolutionError(f"a message of {length} bytes is longer than {_LONGEST}")
    return _receive_exactly(connection, length)


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


# ----------------------------------------------------------------------------------------------- side of the solution
class _Handles:
    """Objects of the solution that the test holds by number."""

    def __init__(self):
        self.objects: list[object] = []

    def dump(self, value: object) -> bytes:
        """`value` for the test."""
        handles = self

        class Pickler(pickle.Pickler):
            def persistent_id(self, item: object) -> tuple[int, str] | None:
                return handles.number(item) if _stays(item) else None

            def reducer_override(self, item: object):
                base = next((base for base in _BASES if isinstance(item, base) and type(item) is not base), None)
                if base is None or _is_known(type(item)):
                    return NotImplemented
                return base, (_contents(item, base),)

        file = io.BytesIO()
        Pickler(file, protocol=5).dump(value)
        return file.getvalue()

    def load(self, content: bytes) -> object:
        """What the test sent."""
        handles = self

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, number: int) -> object:
                return handles.objects[number]

        return Unpickler(io.BytesIO(content)).load()

    def number(self, item: object) -> tuple[int, str]:
        self.objects.append(item)
        return len(self.objects) - 1, type(item).__name__


def _is_known(kind: type) -> bool:
    return kind.__name__ in _VALUES.get(kind.__module__, ())


def _stays(item: object) -> bool:
    """Whether an object is sent as a handle: a class, a function, or an instance of neither known class nor base."""
    if isinstance(item, type):
        return not _is_known(item)
    if item is None or item is NotImplemented or item is Ellipsis or _is_known(type(item)):
        return False
    return not isinstance(item, _BASES)


def _contents(item, base: type) -> object:
    """The value of an instance of a subclass, read by the base's own methods."""
    if base is dict:
        return dict(dict.items(item))
    if base in (tuple, list, set, frozenset):
        return list(base.__iter__(item))
    if base in (bytes, bytearray):
        return bytes(base.__getitem__(item, slice(None)))
    if base is complex:
        return complex.__add__(item, 0j)
    return {str: str.__str__, float: float.__float__}.get(base, int.__int__)(item)


def serve(connection: socket.socket, file: str) -> None:
    """Executes the solution, answers the test until it hangs up, and never returns."""
    try:
        _answer_all(connection, file)
    except SystemExit:
        os.write(2, b"the solution ends the program\n")
    finally:
        sys.stdout.flush()
        os._exit(1)


def _answer_all(connection: socket.socket, file: str) -> None:
    python_program.prepare([])
    sys.argv[:] = [file]
    path = os.path.join(os.getcwd(), file)
    module = python_program.main_module("solution", path)
    handles = _Handles()
    try:
        with open(path, "rb") as opened:
            exec(compile(opened.read(), path, "exec", dont_inherit=True), module.__dict__)
        defined = {name: value for name, value in module.__dict__.items() if not name.startswith("__")}
        modules = {name: value.__name__ for name, value in defined.items() if isinstance(value, types.ModuleType)}
        _send(connection, handles.dump(("loaded", ([name for name in defined if name not in modules], modules))))
    except Exception as error:
        python_program.show(error)
        _send(connection, handles.dump(("raised", _described(error))))
        return
    calls = {
        "name": lambda name: module.__dict__[name],
        "call": lambda what, positional, named: what(*positional, **named),
        "attribute": getattr,
        "set": setattr,
        "iterate": iter,
        "next": next,
        "length": len,
        "item": lambda what, key: what[key],
    }
    while True:
        try:
            message = handles.load(_receive(connection))
        except EOFError:
            return
        try:
            assert isinstance(message, tuple)
            answer = handles.dump(("value", calls[message[0]](*message[1:])))
        except Exception as error:
            answer = handles.dump(("raised", _described(error)))
        _send(connection, answer)


def _described(error: Exception) -> tuple[str, str]:
    try:
        return type(error).__name__, str(error)
    except Exception:
        return type(error).__name__, ""


# ---------------------------------------------------------------------------------------------------- side of the test
class _Connection:
    """Asks the solution's process."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def ask(self, *message: object) -> object:
        """The answer.

        Raises:
          SolutionError: the solution ended, or raised what is no built-in exception; others come as they are.
        """
        file = io.BytesIO()
        try:
            _TestPickler(file, protocol=5).dump(message)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SolutionError(f"the test passes what cannot go to another process: {error}") from None
        try:
            _send(self._connection, file.getvalue())
            return self.answer(iterating=message[0] == "next")
        except (EOFError, OSError):
            raise SolutionError("the solution ended before its tests did") from None

    def answer(self, iterating: bool = False) -> object:
        """What the solution's process sends; `iterating` says whether it was asked for the next item of an iterator."""
        kind, value = _TestUnpickler(io.BytesIO(_receive(self._connection)), self).load()
        if kind != "raised":
            return value
        name, text = value
        known = getattr(builtins, str(name), None)
        raised = SolutionError(f"{name}: {text}")
        # A loop of the test takes StopIteration for its end: only an iterator may say so.
        iterates = isinstance(known, type) and issubclass(known, StopIteration | StopAsyncIteration) and not iterating
        if isinstance(known, type) and issubclass(known, Exception) and not iterates:
            with contextlib.suppress(TypeError):  # a class that takes more than a text
                raised = known(text)
        raise raised


class Remote:
    """An object that the solution's process holds."""

    _number: int
    _kind: str
    _connection: _Connection

    def __init__(self, number: int, kind: str, connection: _Connection):
        self.__dict__.update(_number=number, _kind=kind, _connection=connection)

    def __call__(self, *positional: object, **named: object) -> object:
        return self._connection.ask("call", self, positional, named)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._connection.ask("attribute", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._connection.ask("set", self, name, value)

    def __iter__(self):
        iterator = self._connection.ask("iterate", self)
        if not isinstance(iterator, Remote):
            raise SolutionError("the solution's iterator is none")
        while True:
            try:
                yield self._connection.ask("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> object:
        return self._connection.ask("next", self)

    def __len__(self) -> int:
        length = self._connection.ask("length", self)
        if type(length) is not int:
            raise SolutionError("the solution's length is no number")
        return length

    def __getitem__(self, key: object) -> object:
        return self._connection.ask("item", self, key)

    def __repr__(self) -> str:
        return f"<{self._kind} of the solution>"


class _TestPickler(pickle.Pickler):
    def persistent_id(self, item: object) -> int | None:
        return item._number if type(item) is Remote else None


class _TestUnpickler(pickle.Unpickler):
    """Rebuilds values of known classes only: what the solution's process sends is not trusted."""

    def __init__(self, file: io.BytesIO, connection: _Connection):
        super().__init__(file)
        self._connection = connection

    def find_class(self, module: str, name: str) -> object:
        if name not in _VALUES.get(module, ()):
            raise SolutionError(f"the solution sent an object of {module}.{name}")
        __import__(module)
        return getattr(sys.modules[module], name)

    def persistent_load(self, reference: object) -> Remote:
        match reference:
            case (int(number), str(kind)):
                return Remote(number, kind, self._connection)
        raise SolutionError("the solution sent a reference of another form")


def check(connection: socket.socket, test: str, *, prelude: str, names: list[str]) -> int:
    """Executes a test against the solution at the other end of a connection; 0 only where the test came to its end.

    Args:
      test: text of the test, which the solution's process has never read.
      prelude: trusted text that is executed before the test, such as the imports and helpers of a prompt.
      names: what the test means of the solution even where the prelude or Python define the name, too. Other names
        that only the solution defines are found there as well.
    """
    code = 1
    try:
        _execute(test, prelude, names, _Connection(connection))
        code = 0
    except SystemExit as error:
        code = python_program.exit_code(error) or 1
    except BaseException as error:
        python_program.show(error)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    return code


def _execute(text: str, prelude: str, names: list[str], connection: _Connection) -> None:
    try:
        state = connection.answer()
    except (EOFError, OSError):
        raise SolutionError("the solution ended before its tests began") from None
    space: dict[str, object] = {"__name__": "test"}
    exec(compile(prelude, "prelude", "exec", dont_inherit=True), space)
    program = compile(text, "test", "exec", dont_inherit=True)
    match state:
        case (list(names_there), dict(modules)):
            defined = set(names_there)
        case _:
            raise SolutionError("the solution ended before its tests began")
    for name in _global_names(program) & modules.keys() - space.keys():
        if str(modules[name]).partition(".")[0] in sys.stdlib_module_names:
            space[name] = importlib.import_module(str(modules[name]))
    for name in _global_names(program) & defined:
        if name in names or (name not in space and not hasattr(builtins, name)):
            space[name] = connection.ask("name", name)
    for name in names:
        if name not in defined:
            raise NameError(f"the solution does not define {name}")
    exec(program, space)


def _global_names(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))
