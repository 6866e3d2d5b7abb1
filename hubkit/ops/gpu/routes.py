"""Which arena rows each tile of batch rows uses: found on the device, once per forward, for all layers alike."""

from __future__ import annotations

from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from hubkit.ops import cpu
from hubkit.ops.gpu import gradients


@triton.jit
def route_kernel(
    C, group, rows, counts,
    M, R, stride_c, stride_g, stride_rows,
    BM: tl.constexpr, BR: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """rows[tile, :counts[tile]]: ascending, the arena rows for which any of the tile's BM batch rows has a
    coefficient. Grid: tiles.

    With ALIGN > 1 they come in whole blocks of ALIGN, -1 in the place of those unused: then an arena row's place in
    its block, and so the order of every sum, is the same whatever else the tile uses."""
    tile = tl.program_id(0)
    m = tile * BM + tl.arange(0, BM)
    valid = m < M
    g = tl.load(group + m * stride_g, mask=valid, other=0).to(tl.int64)
    count = 0
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inside = valid[:, None] & (r < R)[None, :]
        c = tl.load(C + g[:, None] * stride_c + r[None, :], mask=inside, other=0.0)
        used = tl.max((c != 0).to(tl.int32), axis=0)
        taken = used
        if ALIGN > 1:
            block = tl.max(tl.reshape(used, (BR // ALIGN, ALIGN)), axis=1)
            taken = tl.reshape(tl.broadcast_to(block[:, None], (BR // ALIGN, ALIGN)), (BR,))
        at = count + tl.cumsum(taken, 0) - taken
        tl.store(rows + tile.to(tl.int64) * stride_rows + at, tl.where(used != 0, r, -1), mask=taken != 0)
        count += tl.sum(taken)
    tl.store(counts + tile, count)


class Lists:
    """The route kernel's output for one tile height. Buffers stay where they are, so a CUDA graph that holds a
    `refresh` follows changes of C and group made in place.

    rows [tiles, R] int32, counts [tiles] int32. Without groups all batch rows are alike, however many come, and one
    tile stands for any (strides of zero).
    """

    def __init__(self, C: Tensor, group: Tensor | None, tile: int, align: int) -> None:
        """C [G, R] fp32; group [M] int32, or None for group 0 throughout; `align` as ALIGN of the kernel."""
        self.C, self.tile, self.align = C, tile, align
        self._places: Tensor | None = None
        self.M = 1 if group is None else len(group)
        self.group = torch.zeros(1, dtype=torch.int32, device=C.device) if group is None else group
        tiles, R = -(-self.M // tile), -(-C.shape[1] // align) * align
        self.rows = torch.empty(tiles, R, dtype=torch.int32, device=C.device)
        self.counts = torch.empty(tiles, dtype=torch.int32, device=C.device)
        alike = group is None
        self.stride_group, self.stride_rows, self.stride_counts = (0, 0, 0) if alike else (1, R, 1)
        self.refresh()

    def refresh(self) -> None:
        """Find the lists anew from what C and group hold now: one launch, no synchronisation."""
        R = self.C.shape[1]
        BR = max(16, self.align, min(128, 4096 // self.tile))
        route_kernel[(len(self.counts),)](
            self.C, self.group, self.rows, self.counts, self.M, R, self.C.stride(0), self.stride_group,
            self.rows.stride(0), BM=self.tile, BR=BR, ALIGN=self.align, num_warps=4,
        )  # fmt: skip
        if self._places is not None:
            self._place(self._places)

    @property
    def places(self) -> Tensor:
        """[tiles, R] int32: at which place of its list a tile has an arena row; -1 where it has not."""
        if self._places is None:
            self._places = torch.empty_like(self.rows)
            self._place(self._places)
        return self._places

    def _place(self, places: Tensor) -> None:
        places.fill_(-1)
        gradients.place_kernel[(len(self.counts),)](
            self.rows, self.counts, places, self.rows.stride(0), BR=128, num_warps=4
        )


class Route:
    """Coefficients C [G, R] fp32 and the group [M] of each input row (None: all of group 0), with their lists.

    `capacity` bounds how many arena rows one tile may ever list, where C is to be changed in place later; by default
    it is what C says now, read on the host, which costs nothing when C comes from there. `active` [G, R] bool says
    what is read where it is not all that has a coefficient.
    """

    def __init__(
        self,
        C: Tensor,
        group: Tensor | None,
        device: torch.device,
        capacity: int | None = None,
        active: Tensor | None = None,
    ) -> None:
        read = C.detach() if active is None else active.to(torch.float32)
        self._host = read.cpu(), None if group is None else group.cpu()
        self._capacities: dict[tuple[int, int], int] = {}
        self._fixed = capacity
        self.whole = C
        self.C = C.detach().to(device).contiguous()
        self._read = self.C if active is None else read.to(device)
        self.group = None if group is None else group.to(device, torch.int32).contiguous()
        self._lists: dict[tuple[int, int], Lists] = {}

    def capacity(self, tile: int, align: int = 1) -> int:
        """The most places that the list of a tile of this height has."""
        if self._fixed is not None:  # whole blocks, of which each used arena row may need one of its own
            return min(self._fixed, -(-self.C.shape[1] // align)) * align
        if (tile, align) not in self._capacities:
            C, group = self._host
            group = torch.zeros(1, dtype=torch.long) if group is None else group
            used = torch.nn.functional.pad(C != 0, (0, -C.shape[1] % align))
            blocks = used.view(len(C), used.shape[1] // align, align).any(2)
            longest = max((int(blocks[rows.unique()].any(0).sum()) for rows in group.split(tile)), default=0)
            self._capacities[tile, align] = longest * align
        return self._capacities[tile, align]

    @cached_property
    def generic(self) -> cpu.Route:
        group, active = self._host[1], None if self._read is self.C else self._read != 0
        return cpu.Route(self.whole.to(self.C.device), None if group is None else group.to(self.C.device), active)

    @property
    def reads(self) -> Tensor:
        """[G, R] fp32: one where a group reads an arena row, else zero."""
        return (self._read != 0).float()

    def lists(self, tile: int, align: int = 1) -> Lists:
        if (tile, align) not in self._lists:
            self._lists[tile, align] = Lists(self._read, self.group, tile, align)
        return self._lists[tile, align]

    def rewrite(self, C: Tensor, group: Tensor | None) -> None:
        """Take C and group of the same shapes for the old ones, in place."""
        lengths = [None if each is None else len(each) for each in (group, self.group)]
        if C.shape != self.C.shape or lengths[0] != lengths[1]:
            raise ValueError(
                f"C {tuple(C.shape)} and {lengths[0]} groups, where {tuple(self.C.shape)}, {lengths[1]} were"
            )
        self._host = C.cpu(), None if group is None else group.cpu()
        self.whole = C
        self.C.copy_(C)
        if self.group is not None and group is not None:
            self.group.copy_(group)
        self.__dict__.pop("generic", None)
        self.refresh()

    def refresh(self) -> None:
        """After C or group were changed in place: find all lists anew, on the device alone."""
        for lists in self._lists.values():
            lists.refresh()
