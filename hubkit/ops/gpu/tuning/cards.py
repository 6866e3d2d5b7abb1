"""What the cost model knows of a card."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Card:
    """Rates are those that large copies and products reach, not those that are advertised.

    flops_per_s: 16-bit products by cuBLAS; fp32_per_s: exact fp32 products. synchronous: the rate of `mma.sync`
    relative to the card's widest matrix instruction. triton: the rate of our base product at many rows relative to
    cuBLAS. cycle_flops: 16-bit operations that a multiprocessor does in a cycle, in which it reads 128 bytes of shared
    memory. latency_s: from asking memory to having it, under load. lookup_s: the same for a few numbers that L2 has,
    and a decision by them. launch_s: between two kernels that depend on each other, in a graph. chained: whether the
    second may be launched before the first has ended.
    """

    name: str
    arch: str
    sms: int
    bytes_per_s: float
    l2_bytes_per_s: float
    flops_per_s: float
    fp32_per_s: float
    l2_bytes: int
    shared_sm: int
    shared_program: int
    cycle_flops: int
    synchronous: float
    triton: float
    latency_s: float
    lookup_s: float
    launch_s: float
    chained: bool


H200 = Card(
    "H200", "sm90", 132, 4.3e12, 7.5e12, 790e12, 40e12, 50 << 20, 228 << 10, 227 << 10,
    cycle_flops=4096, synchronous=0.6, triton=0.8, latency_s=0.7e-6, lookup_s=0.35e-6, launch_s=1.5e-6, chained=True,
)  # fmt: skip
H100 = replace(H200, name="H100", bytes_per_s=3.0e12, flops_per_s=700e12)
A100 = Card(
    "A100", "sm80", 108, 1.75e12, 4.5e12, 260e12, 12e12, 40 << 20, 164 << 10, 163 << 10,
    cycle_flops=2048, synchronous=1.0, triton=0.9, latency_s=0.7e-6, lookup_s=0.35e-6, launch_s=2.0e-6, chained=False,
)  # fmt: skip
# what nobody has measured here, and by how much it may be off either way
DOUBTS = {"l2_bytes_per_s": 1.3, "triton": 1.15, "latency_s": 1.4, "lookup_s": 2.0, "launch_s": 2.0}
CARDS = {card.name.lower(): card for card in (H200, H100, A100)}


def variants(card: Card) -> list[Card]:
    """The card as assumed, and with each doubtful figure at either end of what it may be."""
    moved = [
        replace(card, **{name: value})
        for name, factor in DOUBTS.items()
        for value in (getattr(card, name) / factor, getattr(card, name) * factor)
    ]
    return [card, *moved]


def this_card(device: torch.device) -> Card:
    """The card at hand: the known one of that name, else the nearest, under its own name and size.

    Raises:
        ValueError: the cost model knows no card like it.
    """
    properties = torch.cuda.get_device_properties(device)
    for card in CARDS.values():
        if card.name in properties.name:
            return replace(card, sms=properties.multi_processor_count)
    arch = {8: "sm80", 9: "sm90"}.get(properties.major)
    for card in CARDS.values():
        if card.arch == arch and not torch.version.hip:
            return replace(card, name=properties.name, sms=properties.multi_processor_count)
    raise ValueError(f"the cost model knows no card like {properties.name}: describe one in cards.py")
