"""What can go wrong, said in one sentence of cause and one of remedy, with the exit code that scripts rely on."""


class HubkitError(Exception):
    """A failure with a known cause. The command line prints `cause` and `remedy` and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause} {self.remedy}".strip()


class UsageError(HubkitError):
    """The request itself is wrong: a malformed task file, an adapter that does not fit the base, a bad option."""

    exit_code = 2


class NotFoundError(HubkitError):
    """A name, file or model that is not there."""

    exit_code = 3


class IntegrityError(HubkitError):
    """Bytes that are not what their digest says."""

    exit_code = 4


class PolicyError(HubkitError):
    """Something foreign that hubkit refuses to accept; `rule` names which rule it broke."""

    exit_code = 5

    def __init__(self, cause: str, remedy: str = "", rule: str = "") -> None:
        super().__init__(cause, remedy)
        self.rule = rule


INTERRUPTED = 130
