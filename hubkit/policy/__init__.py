"""What hubkit accepts of foreign names, paths and files; every refusal is a `PolicyError` with its rule.

Whatever comes from elsewhere passes here on pull, add and load. Nothing in this package imports torch or runs
anything that a file contains: no pickle, no expression out of a config, no class name, no path. The rules, in
words: docs/policy.md.
"""

from hubkit.peft_format import PREFIX
from hubkit.policy.config import check_config
from hubkit.policy.files import (
    ADAPTER_FILES,
    CONFIG,
    MAX_TEXT_FILE,
    META,
    README,
    REQUIRED_FILES,
    WEIGHTS,
    check_file_names,
    check_size,
    checked_stream,
    open_file,
    parse_object,
    read_object,
)
from hubkit.policy.folder import Contents, check_adapter_folder, read_adapter
from hubkit.policy.meta import META_VERSION, check_base, check_meta
from hubkit.policy.names import MAX_REF_NAME, NAME, RESERVED, SEGMENT, TAG, check_name, check_tag, escape, safe_join
from hubkit.policy.rules import RULES

__all__ = [
    "ADAPTER_FILES",
    "CONFIG",
    "MAX_REF_NAME",
    "MAX_TEXT_FILE",
    "META",
    "META_VERSION",
    "NAME",
    "PREFIX",
    "README",
    "REQUIRED_FILES",
    "RESERVED",
    "RULES",
    "SEGMENT",
    "TAG",
    "WEIGHTS",
    "Contents",
    "check_adapter_folder",
    "check_base",
    "check_config",
    "check_file_names",
    "check_meta",
    "check_name",
    "check_size",
    "check_tag",
    "checked_stream",
    "escape",
    "open_file",
    "parse_object",
    "read_adapter",
    "read_object",
    "safe_join",
]
