"""Which adapters take part: loaded from the hub, checked against the base and against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.adapter import Adapter
from hubkit.base import Base, check_fits
from hubkit.errors import HubkitError, UsageError
from hubkit.lora.runtime import LoraRuntime

if TYPE_CHECKING:
    from hubkit.hub import Hub


@dataclass(frozen=True)
class Candidate:
    """An adapter that takes part under the name `name`; `digest` is its manifest's, None for one of no
    store.
    """

    name: str
    adapter: Adapter
    digest: str | None = None


def from_hub(hub: Hub, names: Sequence[str] | None) -> list[Candidate]:
    """The named adapters, or every adapter there is, each once.

    Raises:
        NotFoundError: a name is unknown.
        UsageError: a name comes twice, or there is no adapter at all.
    """
    if names is None:
        entries = {entry.digest: entry for entry in hub.entries() if entry.kind == "adapter"}.values()
        found = [Candidate(entry.label, hub.get(entry.label), entry.digest) for entry in entries]
    else:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise UsageError(f"{repeated[0]!r} is named more than once.", "Name each adapter once.")
        found = [Candidate(name, hub.get(name), hub.entry(name).digest) for name in names]
    if not found:
        raise UsageError("There is no adapter to compose.", "Add one with `hubkit add` or `hubkit pull`.")
    return found


class Sieve:
    """Keeps the candidates that can be mixed over one base.

    What was named has to fit, and an error says why it does not; what was merely found is left out with a
    note.
    """

    def __init__(self, *, named: bool) -> None:
        self.named = named
        self.warnings: list[str] = []

    def keep(self, base: Base, runtime: LoraRuntime, candidates: Sequence[Candidate], mode: str) -> list[Candidate]:
        """Those of `candidates` that fit the base and share a template (and, in factor mode, shapes and
        scale).

        Raises:
            UsageError: a named one does not, or none does.
        """
        fitting = [candidate for candidate in candidates if self._fits(base, runtime, candidate)]
        fitting = self._alike(fitting, "prompt template", lambda adapter: adapter.template)
        if mode == "factor":
            fitting = self._alike(fitting, "modules, ranks or scales, which factor mode needs alike", _shape)
        if not fitting:
            raise UsageError(
                f"None of {len(candidates)} adapters can be composed over {base.name}.",
                " ".join(self.warnings[:3]),
            )
        return fitting

    def _fits(self, base: Base, runtime: LoraRuntime, candidate: Candidate) -> bool:
        adapter = candidate.adapter
        try:
            doubts = check_fits(adapter.made_for, base.fingerprint, base.name)
            runtime.add(candidate.name, adapter)  # the runtime knows best what it can run
            runtime.remove(candidate.name)
        except HubkitError as error:
            if self.named:
                raise UsageError(f"{candidate.name} does not fit: {error.cause}", error.remedy) from error
            self.warnings.append(f"{candidate.name} was left out: {error.cause}")
            return False
        self.warnings += [f"{candidate.name}: {doubt}" for doubt in doubts]
        return True

    def _alike(self, candidates: list[Candidate], what: str, trait: Callable[[Adapter], Hashable]) -> list[Candidate]:
        """Those with the most frequent trait, all of them where the candidates were named."""
        traits = [trait(candidate.adapter) for candidate in candidates]
        if len(set(traits)) <= 1:
            return candidates
        common = Counter(traits).most_common(1)[0][0]
        others = [c.name for c, own in zip(candidates, traits, strict=True) if own != common]
        if self.named:
            raise UsageError(f"{_list(others)} differ from the other adapters in {what}.", "Leave them out.")
        self.warnings.append(f"Left out for another {what}: {_list(others)}.")
        return [c for c, own in zip(candidates, traits, strict=True) if own == common]


def _shape(adapter: Adapter) -> Hashable:
    return tuple(sorted((path, b.A.shape, b.B.shape, b.scale) for path, b in adapter.branches.items()))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
