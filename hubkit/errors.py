"""What can go wrong, said in one sentence of cause and one of remedy, with the exit code that scripts rely on."""


class HubkitError(Exception):
    """A failure with a known cause. The command line prints `cause` and `remedy` and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = _bounded(cause)
        self.remedy = _bounded(remedy)

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


def _bounded(text: str, limit: int = 1500) -> str:
    """A screen of a sentence: the name or path in it may be megabytes of somebody else's."""
    return text if len(text) <= limit else f"{text[: limit - 200]} ... {text[-200:]}"


class UsageError(HubkitError):
    """The request itself is wrong: a malformed task file, an adapter that does not fit the base, a bad option."""

    exit_code = 2


class NotFoundError(HubkitError):
    """A name, file or model that is not there."""

    exit_code = 3


class IntegrityError(HubkitError):
    """Bytes that are not what their digest says."""

    exit_code = 4


class StorageError(HubkitError):
    """The operating system refused: a full disk, a read-only folder, no permission, too many open files."""


class PolicyError(HubkitError):
    """Something foreign that hubkit refuses to accept; `rule` names which rule it broke."""

    exit_code = 5

    def __init__(self, cause: str, remedy: str = "", rule: str = "") -> None:
        super().__init__(cause, remedy)
        self.rule = rule


INTERRUPTED = 130
