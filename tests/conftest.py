"""What holds for every test: no network, and threads that wait without spinning, so that tests can share cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything imports torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
