"""The rules by name, each with what breaks it. `docs/policy.md` lists the same names, and a test holds them
together.
"""

from __future__ import annotations

from hubkit.errors import PolicyError

RULES = {
    # names and paths
    "name": "a name that is no name of an entry",
    "tag": "a tag that is none",
    "digest": "text that is no sha256 digest",
    "path": "a path that leaves its folder",
    # files
    "pickle": "weights as a pickle, which runs code when it is loaded",
    "format": "weights in another format than safetensors",
    "link": "a symbolic link out of the adapter's folder",
    "file-type": "a folder, pipe, socket or device in the place of a file",
    "size": "a file larger than its kind may be",
    # JSON
    "json": "text that is no JSON object, holds NaN, or nests too deeply",
    "duplicate-key": "a JSON object that has a key twice",
    # the header of the weights
    "header-size": "a header longer than its file or than 8 MiB",
    "header-json": "a header that is not the JSON of the safetensors format",
    "tensor-count": "no tensors, or more than 4,096",
    "tensor-name": "a tensor that is not named as PEFT names a LoRA's",
    "dtype": "a tensor that is not float32, float16 or bfloat16",
    "shape": "a tensor without elements, or of dimensions that a LoRA's does not have",
    "offsets": "tensors that overlap, leave gaps, or are not as long as their shapes say",
    "finite": "NaN or an infinity among the weights",
    # the LoRA
    "factors": "factors that do not make up branches, or that the config contradicts",
    "rank": "a rank or alpha that is no sensible number, or a rank that the tensors do not have",
    # adapter_config.json
    "peft-type": "another kind of adapter than LoRA",
    "unsupported": "a kind of LoRA that low-rank branches can't express",
    "residual-init": "an initialisation that changes the base's weights when it is loaded",
    "config-key": "a key of adapter_config.json that hubkit does not know, with a value",
    "config-value": "a value that is not of the kind that its key has",
    "code": "a config that names Python code to import",
    "regex": "a regular expression that is not bounded",
    # hubkit's own files, and bases
    "meta": "a hubkit.json that this hubkit does not understand",
    "manifest": "a manifest that is none, or that its files contradict",
    "depth": "mixtures of mixtures more than 32 deep or of more than 1024 adapters",
    "base": "an adapter of the shipped index that names no base model",
    "remote-code": "a base model that needs code of its own",
}


def refusal(rule: str, cause: str, remedy: str = "Give a LoRA adapter as peft saves it.") -> PolicyError:
    """The error for a broken rule, to be raised."""
    assert rule in RULES, rule
    return PolicyError(cause, remedy, rule)
