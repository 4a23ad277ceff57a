"""Settings that hold for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# No test may reach for a model hub: what a test needs it makes itself. Set before anything imports huggingface_hub, and
# inherited by every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"

# Cores are shared with SGLang processes of other tests, so how long one example takes says nothing about our code.
settings.register_profile("flowprefill", deadline=None, print_blob=True)
settings.load_profile("flowprefill")
