"""What the commands' sentences about mistakes have in common."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class SettingsError(ValueError):
    """What a command was asked for cannot be done; the message says why."""


def first_line(error: BaseException) -> str:
    """Of its message, or its type where it has none: PyTorch's go on with notes for developers."""
    if isinstance(error, KeyError):  # whose message is the key alone
        return with_type(error)
    return _line(error) or type(error).__name__


def with_type(error: BaseException) -> str:
    """The same behind the error's type."""
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def told_as(kind: type[Exception], words: str, *others: type[Exception]) -> Iterator[None]:
    """Raise what the user's code raises in this context as a sentence that begins so, but for `others`."""
    try:
        yield
    except (kind, *others):
        raise
    except (Exception, SystemExit) as error:  # a script's code may end the process
        raise kind(f"{words}: {first_line(error)}") from error


def did_you_mean(name: str, names: Iterable[str], otherwise: str) -> str:
    """The name that `name` is most like, case ignored; `otherwise` where it is like none."""
    by_lower_case = {known.lower(): known for known in names}
    near = get_close_matches(name.lower(), by_lower_case, n=1)
    return f"did you mean {by_lower_case[near[0]]}?" if near else otherwise
