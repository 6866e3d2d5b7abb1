"""What an adapter is: low-rank branches per module, full tensors beside them, metadata; and PEFT's files.

An adapter that goes from peft through hubkit to peft comes back bit-equal. `docs/adapters.md` lists what is
represented, what is refused, and the fields of `hubkit.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from hubkit import peft_format
from hubkit.errors import UsageError
from hubkit.peft_format import Scaling, Scalings
from hubkit.policy import CONFIG, META, META_VERSION, PREFIX, WEIGHTS, check_meta, read_adapter
from hubkit.prompt import Template

PARTS = ("A", "B", "magnitude", "bias")


@dataclass(eq=False)
class LowRank:
    """One branch: ΔW = scale · B A on the module that its key names, W being [out, in].

    A is [r, in] and B [out, r], both float32, float16 or bfloat16. On an embedding of n tokens A is [r, n], B
    [dim, r], and its table [n, dim] changes by scale · (B A)ᵀ. `magnitude` [out] is DoRA's m (arXiv
    2402.09353): W' = m · (W + ΔW) / ‖W + ΔW‖ by rows of W. `bias` [out] is the bias of B, which adds
    scale · bias to the output.
    """

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r for a rank-stabilised branch."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def linear(self) -> bool:
        """Whether scale · B A is all of it, so that branches may be added."""
        return self.magnitude is None and self.bias is None

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by part, without those it lacks."""
        return {part: tensor for part in PARTS if (tensor := getattr(self, part)) is not None}


@dataclass(eq=False)
class Adapter:
    """Branches and full tensors by module path in the base model (PEFT's key without `base_model.model.`).

    `config` is adapter_config.json as read, `meta` is hubkit.json (`{"version": 1}` where there was none).
    """

    branches: dict[str, LowRank]
    saved: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=lambda: {"version": META_VERSION})

    @property
    def rank(self) -> int:
        """The largest rank of its branches."""
        return max(branch.rank for branch in self.branches.values())

    @property
    def made_for(self) -> dict[str, Any]:
        """The base that it was trained on, {"name", "architecture", "weights"}; of a foreign adapter the name alone."""
        return self.meta.get("base") or {"name": self.config.get("base_model_name_or_path")}

    @property
    def template(self) -> Template:
        """The prompt template that it was trained with; for a foreign adapter, the usual one for its base."""
        if self.meta.get("template") is None and self.config.get("task_type") == "SEQ_2_SEQ_LM":
            return Template("seq2seq")
        return Template.from_json(self.meta.get("template"))

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read a PEFT LoRA folder, after its files passed `hubkit.policy`.

        Raises:
            NotFoundError: the folder or one of its two files is missing.
            PolicyError: it breaks a rule.
        """
        contents = read_adapter(Path(folder))
        branches, saved = _assemble(load(contents.weights), contents.config)
        return cls(branches, saved, contents.config, contents.meta)

    def save(self, folder: Path) -> None:
        """Write PEFT's two files, and hubkit.json where it says more than its version."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_separate(self.tensors()), folder / WEIGHTS, metadata={"format": "pt"})
        # PEFT's own spelling, so that a config that was only read comes back byte for byte
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2, allow_nan=False))
        if set(self.meta) > {"version"}:
            (folder / META).write_text(json.dumps(self.meta, indent=2, sort_keys=True, allow_nan=False) + "\n")
        else:
            (folder / META).unlink(missing_ok=True)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under PEFT's names."""
        named = {
            peft_format.join_key(module, part, branch.embedding): tensor
            for module, branch in self.branches.items()
            for part, tensor in branch.parts().items()
        }
        return named | {PREFIX + name: tensor for name, tensor in self.saved.items()}

    @classmethod
    def new(
        cls,
        branches: Mapping[str, LowRank],
        *,
        base_name: str | None,
        task_type: str | None,
        target_modules: Iterable[str],
        meta: Mapping[str, Any],
        dropout: float = 0.0,
    ) -> Adapter:
        """An adapter of fresh branches with a config that peft loads; deviating ranks go into its patterns.

        Args:
            task_type: PEFT's word for the kind of base, "CAUSAL_LM" or "SEQ_2_SEQ_LM".
            target_modules: module names as PEFT takes them: whole paths or their last parts.

        Raises:
            UsageError: there are no branches, or only some of them are rank-stabilised, DoRA or biased, which
                PEFT's config can't say.
        """
        kinds = {(b.rslora, b.magnitude is not None, b.bias is not None) for b in branches.values()}
        if len(kinds) != 1:
            cause = "mix rsLoRA, DoRA or biased branches with others" if kinds else "be empty"
            raise UsageError(f"A PEFT adapter can't {cause}.", "Give branches of one kind.")
        _, dora, bias = kinds.pop()
        config = peft_format.build_config(
            {module: Scaling(b.rank, b.alpha, b.rslora) for module, b in branches.items()},
            base_name=base_name,
            task_type=task_type,
            target_modules=target_modules,
            dropout=dropout,
            dora=dora,
            bias=bias,
        )
        return cls(dict(branches), {}, config, check_meta({"version": META_VERSION, **meta}))


def _assemble(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """PEFT's tensors, which the policy let pass, as branches and full tensors."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    scalings = Scalings(config)
    for key, tensor in sorted(tensors.items()):  # safetensors' own order is another one in every process
        module, part = peft_format.split_key(key)
        if part is None:
            saved[module] = tensor
            continue
        parts.setdefault(module, {})[part] = tensor
        if "lora_embedding_" in key:
            embeddings.add(module)
    branches = {}
    for module, found in parts.items():
        stated = scalings.of(module)
        branches[module] = LowRank(**found, alpha=stated.alpha, rslora=stated.rslora, embedding=module in embeddings)
    return branches, saved


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors that own their memory, as safetensors wants them: no views, none shared."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        owned[name] = flat
    return owned
