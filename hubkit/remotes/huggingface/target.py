"""Writing an entry to the Hugging Face Hub: one commit, which PEFT and vLLM load as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from hubkit import strict_json
from hubkit.errors import HubkitError
from hubkit.policy import ADAPTER_FILES, CONFIG, README
from hubkit.remotes import patience
from hubkit.remotes.huggingface import client
from hubkit.remotes.huggingface.card import MARK, write_card
from hubkit.remotes.huggingface.commit import Content, commit
from hubkit.remotes.huggingface.place import MAIN, MANIFEST, PARTS, SIGNATURES, Place
from hubkit.remotes.huggingface.source import HubSource, Listing
from hubkit.remotes.registry import target
from hubkit.remotes.target import Package, Progress, Pushed, Target, Terms
from hubkit.store import signatures
from hubkit.store.blobs import hex_of
from hubkit.store.manifests import digest_of
from hubkit.store.refs import ConflictError

Contents = Mapping[str, Content]  # by path in the repository


class HubTarget(Target):
    """A repository, or an owner under whom the entry's name makes one."""

    def __init__(self, locator: str) -> None:
        Place.parse(locator, "any")
        self._locator = locator
        self.url = f"hf:{locator}"

    def push(self, package: Package, terms: Terms, progress: Progress) -> Pushed:
        place = Place.parse(self._locator, PurePosixPath(package.name).name)
        with client.writing():
            return Push(place, package, terms, progress).run()


@target("hf")
def open_repository_for_writing(locator: str) -> HubTarget:
    """Raises:
    UsageError: the reference is malformed.
    """
    return HubTarget(locator)


class Push:
    """One push. It may be tried again: what the first try got there is found to be there."""

    def __init__(self, place: Place, package: Package, terms: Terms, progress: Progress) -> None:
        self.place, self.package, self.terms, self.progress = place.at(place.revision or MAIN), package, terms, progress
        self._first: Listing | None = None  # what was there when the push began

    def run(self) -> Pushed:
        wanted = self._wanted()
        return patience.retrying(lambda: self._attempt(wanted))

    def _attempt(self, wanted: Contents) -> Pushed:
        now = self._listing()
        wanted = self._spare_card(wanted, now)
        missing, stale = _changes(self.place, wanted, now)
        if self._first is None:
            self._check_expected(now)
            self._first = now
        elif now.commit != self._first.commit and (missing or stale):
            raise client.conflict(self.place)
        tagged = self._tagged()
        if tagged and _differs(self.place, wanted, tagged):
            raise ConflictError(f"{self.place.repo} has another tag {self.package.tag}.", "Push under a new tag.")
        commit_id = now.commit
        if missing or stale:
            commit_id = commit(self.place, missing, stale, self._message(), now.commit, self.progress)
        if tagged is None:
            self._tag(commit_id)
        return self._report(commit_id, wanted, missing)

    def _listing(self) -> Listing:
        """What is there now, after making the repository or the branch if there is none."""
        try:
            return Listing.of(self.place)
        except client.MissingError:
            self._make()
        return Listing.of(self.place)

    def _make(self) -> None:
        api = client.api()
        try:
            with client.explained(self.place):
                api.create_repo(self.place.repo, private=self.terms.private, exist_ok=True)
                if self.place.revision != MAIN:
                    api.create_branch(self.place.repo, branch=self.place.revision or MAIN, exist_ok=True)
        except client.MissingError:
            raise HubkitError(f"{self.place.repo} can't be made.", client.LOG_IN) from None

    def _wanted(self) -> dict[str, Content]:
        """Every file of the repository-to-be: the root is what PEFT loads, the manifest says what the entry is, a
        mixture's parts lie below."""
        root, package = self.place, self.package
        if package.manifest["kind"] == "adapter":
            wanted = self._adapter(root, package.digest)
        else:
            folder = package.folder()
            wanted = {root.path(n): Content.of_file(folder / n) for n in ADAPTER_FILES if (folder / n).is_file()}
        wanted[root.path(MANIFEST)] = self._manifest(package.digest)
        for digest, manifest in package.manifests.items():
            if digest != package.digest:
                part = root.part(digest)
                wanted[part.path(MANIFEST)] = self._manifest(digest)
                wanted |= self._adapter(part, digest) if manifest["kind"] == "adapter" else {}
        wanted |= self._signatures()
        if root.path(README) not in wanted:
            config = strict_json.parse(wanted[root.path(CONFIG)].read())
            title = PurePosixPath(root.folder or root.repo).name
            card = write_card(title, package.manifest, package.digest, config)
            wanted[root.path(README)] = Content.of_bytes(card.encode())
        return wanted

    def _adapter(self, place: Place, digest: str) -> dict[str, Content]:
        listed = self.package.manifests[digest]["files"]
        return {
            place.path(name): Content(self.package.blob(file["digest"]), hex_of(file["digest"]), file["size"])
            for name, file in listed.items()
        }

    def _signatures(self) -> dict[str, Content]:
        return {
            place.path(f"{SIGNATURES}/{signatures.file_of(signatures.digest_of(data))}"): Content.of_bytes(data)
            for digest, signed in self.package.signatures.items()
            for place in [self.place if digest == self.package.digest else self.place.part(digest)]
            for data in signed
        }

    def _manifest(self, digest: str) -> Content:
        return Content.of_bytes(strict_json.canonical(self.package.manifests[digest]))

    def _spare_card(self, wanted: Contents, now: Listing) -> Contents:
        """`wanted` without our card, where somebody wrote one by hand."""
        path = self.place.path(README)
        ours = README not in self.package.manifest.get("files", {})
        if not ours or path not in now.files or wanted[path].is_at(now.files[path]):
            return wanted
        if MARK.encode() in HubSource(self.place, now).read(README):
            return wanted
        return {other: content for other, content in wanted.items() if other != path}

    def _check_expected(self, now: Listing) -> None:
        """Raise ConflictError unless the place holds what the push is to replace."""
        if self.terms.expected is None:
            return
        source = HubSource(self.place, now)
        held = digest_of(source.manifest) if source.manifest else "something else" if source.files() else "none"
        if held != self.terms.expected:
            raise ConflictError(
                f"{self.place} holds {held}, not {self.terms.expected}.", "Pull and look at it, then push again."
            )

    def _tagged(self) -> Listing | None:
        """What the package's tag means there already, if it is one that the Hub should know."""
        if self.package.tag == "latest":
            return None
        with client.explained(self.place):
            tags = client.api().list_repo_refs(self.place.repo).tags
        return Listing.of(self.place.at(self.package.tag)) if self.package.tag in {tag.name for tag in tags} else None

    def _tag(self, commit_id: str) -> None:
        if self.package.tag != "latest":
            with client.explained(self.place):
                client.api().create_tag(self.place.repo, tag=self.package.tag, revision=commit_id)

    def _message(self) -> str:
        return self.terms.message or f"Version {self.package.digest[:19]}"

    def _report(self, commit_id: str, wanted: Contents, missing: Contents) -> Pushed:
        sent, all_bytes = (sum(content.size for content in which.values()) for which in (missing, wanted))
        url = str(self.place.at(commit_id))
        signed = sum(map(_is_signature, missing))
        return Pushed(url, sent, all_bytes - sent, len(missing), len(wanted) - len(missing), signed)


def _changes(place: Place, wanted: Contents, now: Listing) -> tuple[dict[str, Content], list[str]]:
    """The files to send, and those of an earlier push that are to go. What hubkit did not write stays, and so do
    others' signatures of a manifest that stays.
    """
    missing = {path: content for path, content in wanted.items() if not content.is_at(now.files.get(path))}
    own = {place.path(name) for name in (*ADAPTER_FILES, MANIFEST) if name != README}
    below = (place.path(f"{PARTS}/"), place.path(f"{SIGNATURES}/"))
    stale = [path for path in now.files if (path in own or path.startswith(below)) and path not in wanted]
    staying = wanted.keys() - missing
    return missing, [path for path in stale if not _is_signature(path) or _signed(path) not in staying]


def _differs(place: Place, wanted: Contents, there: Listing) -> bool:
    """Whether something else is there, signatures aside: a version is the same without them."""
    missing, stale = _changes(place, wanted, there)
    return not all(map(_is_signature, [*missing, *stale]))


def _is_signature(path: str) -> bool:
    folder, name = PurePosixPath(path).parent.name, PurePosixPath(path).name
    return folder == SIGNATURES and signatures.FILE.fullmatch(name) is not None


def _signed(path: str) -> str:
    """The path of the manifest that the signature at `path` is of."""
    return str(PurePosixPath(path).parent.with_name(MANIFEST))
