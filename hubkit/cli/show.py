"""`hubkit show NAME`: everything the hub knows of one entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output, megabytes, table
from hubkit.cli.verify import CertOption, KeyOption, trusted

if TYPE_CHECKING:
    from hubkit.provenance.inspection import Inspection

EPILOG = (
    "Examples:  hubkit show plural   |   hubkit show plural --spectrum   |   hubkit show plural --png plural.png   |   "
    "hubkit show mix-few_shot:latest --format json"
)


def register(app: typer.Typer) -> None:
    app.command("show", epilog=EPILOG)(show)


def show(
    name: Annotated[str, typer.Argument(help="name, name:tag or sha256:... digest", autocompletion=names)],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Also read the weights: size and directions of the change, outliers.")
    ] = False,
    png: Annotated[Path | None, typer.Option("--png", help="Draw the spectrum into this file.")] = None,
    key: KeyOption = None,
    cert: CertOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Show one entry: what it is, where it comes from, what it is made of, and what of it deserves a closer look."""
    from hubkit.errors import UsageError
    from hubkit.hub import Hub
    from hubkit.provenance.inspection import inspect
    from hubkit.provenance.lineage import card_of, lineage
    from hubkit.signing import check

    trust = trusted(key, cert)
    out, hub = Output(format), Hub()
    if {"*", "+"} & {*name}:
        remedy = "Show one of its parts, or a stored mixture (`hubkit list --kind mixture`)."
        raise UsageError(f"{name[:200]!r} is a mixture, not the name of one.", remedy)
    entry = hub.entry(name)
    with out.progress("reading the store") as progress:
        finder = hub.finder(progress)
        origin = lineage(hub, entry, finder)
    found = inspect(hub, entry, finder, spectrum=spectrum or png is not None)
    card, count = card_of(hub, entry), len(hub.store.signatures.of(entry.digest))
    signature = {"count": count, "verdict": check(hub, entry, trust) if trust else None}
    if png:
        from hubkit.provenance.portrait import draw

        draw(entry, found, png)
    facts = ("name", "tag", "kind", "base", "rank", "digest", "size", "source", "manifest")
    data = (
        {fact: getattr(entry, fact) for fact in facts}
        | {"card": card, "lineage": origin, "signature": signature}
        | found.to_json()
    )

    def human() -> None:
        known = [("name", entry.label), ("kind", entry.kind), ("base", entry.base or "-")]
        known += [("rank", str(entry.rank)), ("size", megabytes(entry.size)), ("digest", entry.digest)]
        known += [("from", origin["source"] or entry.source), *_card_facts(card or {}), *_origin_facts(origin)]
        known += _signature_facts(signature, trust is not None)
        known += [(key, _line(value)) for key, value in (entry.manifest.get("meta") or {}).items() if value]
        table(("fact", "value"), known)
        _print_parts(origin["parts"])
        _print_inspection(found)
        if entry.manifest.get("files"):
            files = [(path, megabytes(f["size"]), f["digest"]) for path, f in entry.manifest["files"].items()]
            _section(("file", "size", "digest"), files, right="size")
        _print_flags(found)
        if png:
            print(f"\ndrawn: {png}")

    out.result(data, human, entry.digest)


def _section(columns: tuple[str, ...], rows: list[tuple[Any, ...]], right: str = "") -> None:
    if rows:
        print()
        table(columns, rows, right=right)


def _card_facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    """What the index says of a starter adapter: its task, and how well it does."""
    if not card:
        return []
    low, high = card["interval"]
    score = f"{card['score']:.2f} ({low:.2f} to {high:.2f}) on {card['test_rows']} rows, base {card['base_score']:.2f}"
    return [("task", card["task"]), (card["metric"], f"{score}, majority {card['majority']:.2f}")]


def _origin_facts(origin: dict[str, Any]) -> list[tuple[str, str]]:
    data = "; ".join(", ".join(str(value) for value in source.values()) for source in origin["data"])
    rows = [("data", data), ("also named", ", ".join(origin["names"])), ("used by", ", ".join(origin["used_by"]))]
    return [(key, value) for key, value in rows if value]


def _signature_facts(signature: dict[str, Any], checked: bool) -> list[tuple[str, str]]:
    if checked:
        return [("signature", signature["verdict"] or "none")]
    count = signature["count"]
    return [("signature", f"{count} there, not checked: give --key or --cert")] if count else []


def _print_parts(parts: list[dict[str, Any]]) -> None:
    rows = [(f"{part['weight']:+.4f}", part["name"], part["digest"]) for part in parts]
    _section(("weight", "part", "digest"), rows, right="weight")


def _print_inspection(found: Inspection) -> None:
    """Families of modules with ranks and shapes, and where the weights were read, the median of their spectra."""
    if found.spectra is not None:
        _print_spectra(found)
    elif found.anatomy:
        rows = [
            (f.name, f.modules, _span(f.ranks), _span(f.scales), f"{_span(f.inputs)} → {_span(f.outputs)}")
            for f in found.anatomy.families
        ]
        _section(("modules", "count", "rank", "scale", "in → out"), rows, right="count rank scale")
    if found.anatomy and found.anatomy.saved:
        _section(("replaced tensors",), [(name,) for name in found.anatomy.saved])


def _print_spectra(found: Inspection) -> None:
    from statistics import median

    from hubkit.provenance.anatomy import family_of

    families: dict[str, list[str]] = {}
    for module in found.spectra or {}:
        families.setdefault(family_of(module), []).append(module)
    rows = []
    for family, modules in families.items():
        of = [(found.spectra or {})[module] for module in modules]
        shares = [(found.spectra or {})[m].frobenius / found.base_norms[m] for m in modules if found.base_norms.get(m)]
        rows.append(
            (
                family, len(of), _span(sorted({len(s.sigma) for s in of})), f"{median(s.frobenius for s in of):.3g}",
                f"{max(s.top for s in of):.3g}", f"{median(s.stable_rank for s in of):.1f}",
                f"{median(s.effective_rank for s in of):.1f}", f"{median(shares):.4f}" if shares else "-",
            )
        )  # fmt: skip
    columns = ("modules", "count", "rank", "‖ΔW‖F", "top σ", "stable rank", "eff. rank", "of ‖W‖F")
    _section(columns, rows, right=" ".join(c for c in columns if " " not in c))
    print(f"‖ΔW‖F of all modules: {found.norm:.3g}; compared with {len(found.others)} others of its base.")
    print(
        "ΔW is what the adapter adds to a weight W. ‖ΔW‖F is its size, top σ the strength of its strongest direction,"
    )
    print("stable and effective rank say how many directions it really uses. Medians, but the largest top σ.")


def _print_flags(found: Inspection) -> None:
    if found.flags:
        return _section(("red flag", "it"), [(flag.flag, flag.detail) for flag in found.flags])
    read = found.spectra is not None
    what = "files, config and weights" if read else "files and config; --spectrum reads the weights"
    if found.anatomy or read:
        print(f"\nNo red flag in {what}. That is no proof that it is harmless.")


def _span(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={json.dumps(inner, ensure_ascii=False)}" for key, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
