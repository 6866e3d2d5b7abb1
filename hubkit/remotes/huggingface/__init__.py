"""`hf://owner/name[@revision][/subfolder]`: the Hugging Face Hub, or another one that `HF_ENDPOINT` names.

Its own client does what it does well: tokens, endpoints, offline mode, what a repository holds, commits. The bytes are
streamed by hubkit, which keeps them once, verified. What a repository looks like: docs/remotes.md.
"""

from hubkit.remotes.huggingface.source import open_repository
from hubkit.remotes.huggingface.target import open_repository_for_writing

__all__ = ["open_repository", "open_repository_for_writing"]
