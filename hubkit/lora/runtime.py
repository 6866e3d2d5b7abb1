"""Adapters in a live model: place them, route batch rows to them, take them out again."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hubkit.errors import UsageError
from hubkit.lora import ticket
from hubkit.lora.arena import Layout
from hubkit.lora.linear import MultiLoraLinear, Switch
from hubkit.lora.routing import Groups, Routing
from hubkit.ops.factors import compose_factors

if TYPE_CHECKING:
    from hubkit.adapter import Adapter, LowRank

Rows = Sequence[int] | Tensor


class LoraRuntime:
    """Many adapters resident in one transformers model, and for every batch row its own mixture of them.

        runtime = LoraRuntime(model)
        runtime.add("a", adapter); runtime.add("b", other)
        with runtime.use([{"a": 1.0}, {"a": 0.7, "b": 0.3}, {}]):    # three rows: a, a mixture, the base
            model.generate(...)

    Outside a `use` block the model computes the bare base, to the bit. One thread at a time.
    """

    def __init__(self, model: Any, *, targets: Iterable[str] | None = None) -> None:
        """`targets`: the linears that adapters may touch, by path or by its last parts ("q_proj",
        "self_attn.o_proj"). None allows every nn.Linear but the output head. A linear is replaced when the
        first adapter needs it."""
        self.model = model
        self.targets = None if targets is None else tuple(targets)
        self._switch = Switch()
        self._linears: dict[str, MultiLoraLinear] = {}
        self._originals: dict[str, nn.Linear] = {}
        self._adapters: dict[str, tuple[str, ...]] = {}  # key -> the module paths that it occupies

    @property
    def keys(self) -> list[str]:
        return list(self._adapters)

    def add(self, key: str, adapter: Adapter) -> None:
        """Place the adapter's branches into the arenas, in the model's dtype.

        All or nothing. UsageError: the key is taken, a module or a shape does not fit, a factor is not
        finite, or the adapter has parts that cannot run here (DoRA, saved tensors, embedding branches, LoRA
        biases).
        """
        self._refuse_in_use("add")
        if key in self._adapters:
            raise UsageError(f"An adapter is already loaded as {key!r}.", "Remove it first, or choose another key.")
        self._check(key, adapter)
        for path, branch in adapter.branches.items():
            if path not in self._linears:
                self._replace(path)
            self._linears[path].arena.add(key, branch.A, branch.B, branch.scale)
        self._adapters[key] = tuple(adapter.branches)

    def remove(self, key: str) -> None:
        """Free the adapter's rows; UsageError if there is none of that key."""
        self._refuse_in_use("remove")
        self._require(key)
        for path in self._adapters.pop(key):
            self._linears[path].arena.remove(key)

    def factors(self, key: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Module path -> (A [r, in], Bt [r, out]): views for rewriting an adapter in place between two `use`
        blocks.

        A key may be added with all-zero factors just to be a slot for this. The views end with the next
        `add`; what is written inside a `use` block takes effect in the next one, or after `update`.
        """
        self._require(key)
        return {path: self._linears[path].arena.factors(key) for path in self._adapters[key]}

    def compose(self, slots: Sequence[str], sources: Sequence[str], weights: Tensor) -> None:
        """Rewrite the factors of `slots` by LoraHub's rule: A and B of slot p become those of all sources, weighted by
        weights[p]. All keys are of adapters with equal modules and ranks; weights [P, n] fp32, or fp64."""
        places: dict[tuple[Layout, torch.device], tuple[Tensor, Tensor, Tensor]] = {}
        for path in self._adapters[slots[0]]:
            arena = self._linears[path].arena
            key = arena.layout, arena.A.device
            if key not in places:
                starts = (torch.tensor([arena.slots[k].start for k in keys]) for keys in (sources, slots))
                here, there = (start.to(arena.A.device, torch.int32) for start in starts)
                places[key] = here, weights.to(arena.A.device), there
            for factor in (arena.A, arena.Bt):
                compose_factors(factor, *places[key], arena.slots[slots[0]].rank)

    def trained(self) -> list[Tensor]:
        """The arenas' A [R, in] and Bt [R, out] of all linears, for an optimizer: from now on they want gradients. Rows
        that no adapter holds are NaN and get a gradient of zero. The next `add` ends that."""
        self._refuse_in_use("train")
        for linear in self._linears.values():
            linear.arena.follow(linear.weight)
        return [t.requires_grad_() for module in self._linears.values() for t in (module.arena.A, module.arena.Bt)]

    @contextmanager
    def use(self, groups: Groups, rows: Rows | None = None, *, capacity: int | None = None) -> Iterator[None]:
        """Within the block, batch row b computes the base plus `sum(w * delta(key))` over `groups[rows[b]]`.

        rows: the group of each batch row; None gives row b group b, or, with a single group, every row that
        one. A row's group serves all its tokens. Blocks nest; the inner one replaces the outer. UsageError:
        unknown key, non-finite weight, a row that names no group.

        A weight may be a tensor of no dimension that wants a gradient; then one backward pass belongs to a block.
        Blocks go around the calls of compiled code; one inside breaks the graph, an error of torch with `fullgraph`.

        capacity: makes room for `update`, as many ranks as the adapters of a whole batch will ever have together in a
        linear; the time of a forward pass on a GPU grows a little with it.
        """
        if torch.compiler.is_compiling():  # the compiler would move what is computed in the block out of it
            torch._dynamo.graph_break(msg="A `use` block cannot be opened in compiled code. Open it around the call.")
        for linear in self._linears.values():
            linear.arena.follow(linear.weight)
        routing = Routing(self._checked(groups), self._indexed(len(groups), rows), capacity)
        outer = self._switch.routing
        self._switch.turn(routing)
        try:
            yield
        finally:
            self._switch.turn(outer)
            routing.close()

    def update(self, groups: Groups, rows: Rows | None = None) -> None:
        """Within a `use` block that was given a capacity: other mixtures for the same number of groups, and other
        groups for the same number of rows (None: as they were).

        Tensors stay where they are, so CUDA graphs that were captured in the block follow, and so does what was
        written to `factors`. Also a UsageError: more ranks than the capacity. Nothing is changed then.
        """
        routing = self._switch.routing
        if routing is None:
            raise UsageError("No `use` block is open whose routing could be updated.", "Call `update` inside of one.")
        routing.update(self._checked(groups), None if rows is None else self._indexed(len(groups), rows))
        ticket.void(self._switch.ticket)  # what is computed again for a backward pass would not be the same
        self._switch.turn(routing)

    def detach(self) -> None:
        """Put the original modules back and drop all adapters."""
        self._refuse_in_use("detach")
        for path, original in self._originals.items():
            self.model.set_submodule(path, original)
        self._linears.clear()
        self._originals.clear()
        self._adapters.clear()

    def _checked(self, groups: Groups) -> Groups:
        for group in groups:
            for key, weight in group.items():
                self._require(key)
                if not math.isfinite(weight.detach() if isinstance(weight, Tensor) else weight):
                    raise UsageError(f"The weight of {key!r} is {weight}.", "Weights have to be finite numbers.")
        return groups

    def _indexed(self, count: int, rows: Rows | None) -> Tensor | None:
        """Each batch row's group [batch] int64; None if a single group is everybody's."""
        if rows is None:
            return None if count == 1 else torch.arange(count)
        index = torch.as_tensor(rows, dtype=torch.long, device="cpu")
        if index.dim() != 1 or not all(0 <= row < count for row in index.tolist()):
            raise UsageError(
                f"Rows name groups from 0 to {count - 1}, but got {index.tolist()}.",
                "Give one group index for each row of the batch.",
            )
        return index

    def _check(self, key: str, adapter: Adapter) -> None:
        if adapter.saved:
            raise UsageError(
                f"Adapter {key!r} replaces whole tensors ({_some(adapter.saved)}), for all rows alike.",
                "Merge it into a copy of the base instead.",
            )
        for path, branch in adapter.branches.items():
            unsupported = {
                "a DoRA magnitude": branch.magnitude is not None,
                "a LoRA bias": branch.bias is not None,
                "an embedding branch": branch.embedding,
            }
            for what, present in unsupported.items():
                if present:
                    raise UsageError(
                        f"Adapter {key!r} has {what} on {path!r}, which cannot run from the arena yet.",
                        "Merge it into a copy of the base instead.",
                    )
            self._check_shape(key, path, branch)

    def _check_shape(self, key: str, path: str, branch: LowRank) -> None:
        linear = self._linears.get(path) or self._find(key, path)
        rank = branch.A.shape[0]
        expected = (rank, linear.in_features), (linear.out_features, rank)
        if (tuple(branch.A.shape), tuple(branch.B.shape)) != expected or rank == 0:
            raise UsageError(
                f"Adapter {key!r} has A {tuple(branch.A.shape)} and B {tuple(branch.B.shape)} on {path!r}, "
                f"a linear from {linear.in_features} to {linear.out_features} features.",
                "Use the base model that the adapter was trained on.",
            )
        for name, tensor in (("adapter", branch.A), ("adapter", branch.B), ("model", linear.weight)):
            if tensor.is_meta:
                raise UsageError(
                    f"The {name} has no numbers for {path!r}, only a shape (its device is meta).",
                    f"Load the {name} onto a device first, without offloading.",
                )
        if not (branch.A.isfinite().all() and branch.B.isfinite().all() and math.isfinite(branch.scale)):
            raise UsageError(f"Adapter {key!r} holds NaN or infinity on {path!r}.", "Train or download it again.")

    def _find(self, key: str, path: str) -> nn.Linear:
        """The model's own linear at a path that no adapter has touched yet."""
        if "experts" in path.split("."):
            raise UsageError(
                f"Adapter {key!r} targets {path!r}, experts of a mixture-of-experts layer, whose tokens no longer say "
                "which row of the batch they are of.",
                "Merge the adapter into a copy of the base instead.",
            )
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            raise UsageError(
                f"Adapter {key!r} has weights for {path!r}, which this model does not have.",
                "Use the base model that the adapter was trained on.",
            ) from None
        # a subclass computes something else (quantised weights, a shard), and so does another adapter library
        if type(module) is not nn.Linear:
            raise UsageError(
                f"Adapter {key!r} targets {path!r}, a {type(module).__name__} and not a plain nn.Linear.",
                "Merge the adapter into a copy of the base instead.",
            )
        if "forward" in vars(module):
            raise UsageError(
                f"Adapter {key!r} targets {path!r}, whose `forward` was replaced by another library (for offloading?).",
                "Load the model without that, or merge the adapter into a copy of the base.",
            )
        if not self._allowed(path, module):
            raise UsageError(
                f"Adapter {key!r} targets {path!r}, which is not among the modules that adapters may touch.",
                "Pass it in `targets`.",
            )
        return module

    def _allowed(self, path: str, module: nn.Module) -> bool:
        if self.targets is None:
            head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
            return module is not head
        return any(path == target or path.endswith("." + target) for target in self.targets)

    def _replace(self, path: str) -> None:
        original = self.model.get_submodule(path)
        self._originals[path] = original
        self._linears[path] = MultiLoraLinear(original, self._switch)
        self.model.set_submodule(path, self._linears[path])

    def _require(self, key: str) -> None:
        if key not in self._adapters:
            near = difflib.get_close_matches(key, self._adapters, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Loaded are: {_some(self._adapters) or 'none'}."
            raise UsageError(f"No adapter is loaded as {key!r}.", hint)

    def _refuse_in_use(self, what: str) -> None:
        if self._switch.routing is not None:
            raise UsageError(f"Cannot {what} while a `use` block is open.", "Leave the block first.")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
