"""What holds for every test: no network, and threads that do not spin for long, so that tests can share cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before anything imports torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
